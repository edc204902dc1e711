"""Whether fine-tuning moves a model in the directions in which alignment did (arXiv 2505.14185)."""

from subspace_jax.interpret.safety_subspaces.overlap import (
    MSOTree,
    activation_layers,
    activation_overlap,
    last_token,
    mso_tree,
)
from subspace_jax.interpret.safety_subspaces.params import (
    ProjectionMetrics,
    SweepRow,
    TaskModes,
    project_params,
    sweep,
    task_modes,
)
from subspace_jax.interpret.safety_subspaces.projection import RankBasis, project_update, rank_fraction_basis

__all__ = [
    "MSOTree",
    "ProjectionMetrics",
    "RankBasis",
    "SweepRow",
    "TaskModes",
    "activation_layers",
    "activation_overlap",
    "last_token",
    "mso_tree",
    "project_params",
    "project_update",
    "rank_fraction_basis",
    "sweep",
    "task_modes",
]


def __dir__():
    return __all__
