"""Intrinsic dimension of objective landscapes (arXiv 1804.08838)."""

from subspace_jax.interpret.intrinsic_dimension.measure import (
    IntrinsicDimension,
    Measurement,
    default_intrinsic,
    measure_config,
    measure_intrinsic_dimension,
    plot_intrinsic_dimension,
)
from subspace_jax.interpret.intrinsic_dimension.task import SubspaceTask

__all__ = [
    "IntrinsicDimension",
    "Measurement",
    "SubspaceTask",
    "default_intrinsic",
    "measure_config",
    "measure_intrinsic_dimension",
    "plot_intrinsic_dimension",
]
