"""Several fine-tuned models of one base as one model (arXiv 2312.06173)."""

from subspace_jax.merge.subspace_fusion.concrete import (
    ConcreteSettings,
    ConcreteState,
    Fusion,
    Optimizers,
    adamerging_step,
    concrete_adamerging_step,
    concrete_init,
    concrete_mask,
    concrete_task_arithmetic_step,
    entropy_objective,
    mask_task_vectors,
    prediction_entropy,
    rescale_mask,
)
from subspace_jax.merge.subspace_fusion.core import Tied, apply_task_vectors, average, task_arithmetic, task_vectors
from subspace_jax.merge.subspace_fusion.statistics import (
    GramStats,
    fisher_diagonal,
    fisher_merge,
    regmean_merge,
    regmean_stats,
)
from subspace_jax.merge.subspace_fusion.ties import ties_merge

__all__ = [
    "ConcreteSettings",
    "ConcreteState",
    "Fusion",
    "GramStats",
    "Optimizers",
    "Tied",
    "adamerging_step",
    "apply_task_vectors",
    "average",
    "concrete_adamerging_step",
    "concrete_init",
    "concrete_mask",
    "concrete_task_arithmetic_step",
    "entropy_objective",
    "fisher_diagonal",
    "fisher_merge",
    "mask_task_vectors",
    "prediction_entropy",
    "regmean_merge",
    "regmean_stats",
    "rescale_mask",
    "task_arithmetic",
    "task_vectors",
    "ties_merge",
]


def __dir__():
    return __all__
