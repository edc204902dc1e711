"""Alignment of two paired feature spaces in the subspace in which they are correlated (arXiv 2503.05283)."""

from subspace_jax.interpret.platos_cave_3d.anchors import select_anchors, stretched
from subspace_jax.interpret.platos_cave_3d.core import (
    AffineMap,
    CCASubspace,
    apply_affine,
    fit_affine,
    fit_cca_subspace,
    project_x,
    project_y,
    subspace_of_moments,
)
from subspace_jax.interpret.platos_cave_3d.evaluate import (
    AlignmentReport,
    align,
    match_accuracy,
    pearson,
    retrieval_at_k,
)
from subspace_jax.interpret.platos_cave_3d.scores import (
    cosine_scores,
    local_cka_scores,
    relative_representation,
)

__all__ = [
    "AffineMap",
    "AlignmentReport",
    "CCASubspace",
    "align",
    "apply_affine",
    "cosine_scores",
    "fit_affine",
    "fit_cca_subspace",
    "local_cka_scores",
    "match_accuracy",
    "pearson",
    "project_x",
    "project_y",
    "relative_representation",
    "retrieval_at_k",
    "select_anchors",
    "stretched",
    "subspace_of_moments",
]


def __dir__():
    return __all__
