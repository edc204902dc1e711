"""Additive, orthogonal representations of concepts, which compositional generalisation needs (arXiv 2602.24264)."""

from subspace_jax.interpret.compositional_linear.bounds import (
    StabilityGap,
    check_divisibility,
    min_dimension,
    stability_gap,
    two_level_min_dimension,
)
from subspace_jax.interpret.compositional_linear.core import (
    FactorizationScore,
    Factors,
    concept_factors,
    linear_factorization_r2,
    reconstruct,
)
from subspace_jax.interpret.compositional_linear.data import (
    ConceptGrid,
    full_grid,
    orthogonal_factor_embedding,
    random_relu_features,
    shape_pictures,
    transformed_digits,
)
from subspace_jax.interpret.compositional_linear.label_table import LabelTable, read_label_table
from subspace_jax.interpret.compositional_linear.penalties import factorization_loss, orthogonality_loss
from subspace_jax.interpret.compositional_linear.probes import (
    CompositionalAccuracy,
    ConceptProbes,
    ProbeSettings,
    Split,
    compositional_accuracy,
    fit_concept_probes,
    split_combinations,
)
from subspace_jax.interpret.compositional_linear.report import (
    Geometry,
    ReportSettings,
    geometry_table,
    measure_geometry,
    plot_geometry,
)
from subspace_jax.interpret.compositional_linear.stream import (
    Decomposition,
    array_blocks,
    decompose,
    decomposition_r2,
)
from subspace_jax.interpret.compositional_linear.structure import (
    FactorCosines,
    effective_rank,
    factor_cosines,
    probe_span,
    span_r2,
)

__all__ = [
    "CompositionalAccuracy",
    "ConceptGrid",
    "ConceptProbes",
    "Decomposition",
    "FactorCosines",
    "FactorizationScore",
    "Factors",
    "Geometry",
    "LabelTable",
    "ProbeSettings",
    "ReportSettings",
    "Split",
    "StabilityGap",
    "array_blocks",
    "check_divisibility",
    "compositional_accuracy",
    "concept_factors",
    "decompose",
    "decomposition_r2",
    "effective_rank",
    "factor_cosines",
    "factorization_loss",
    "fit_concept_probes",
    "full_grid",
    "geometry_table",
    "linear_factorization_r2",
    "measure_geometry",
    "min_dimension",
    "orthogonal_factor_embedding",
    "orthogonality_loss",
    "plot_geometry",
    "probe_span",
    "random_relu_features",
    "read_label_table",
    "reconstruct",
    "shape_pictures",
    "span_r2",
    "split_combinations",
    "stability_gap",
    "transformed_digits",
    "two_level_min_dimension",
]


def __dir__():
    return __all__
