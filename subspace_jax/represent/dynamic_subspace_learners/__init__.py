"""Attention-based dynamic subspace learners: metric learning in subspaces that are split in training (2206.09068)."""

from subspace_jax.represent.dynamic_subspace_learners.core import (
    PlateauState,
    ScoreState,
    Split,
    contiguous_learners,
    fresh_learners,
    init_plateau,
    init_scores,
    last_learner,
    neuron_scores,
    normalize_per_learner,
    plateau_reached,
    plateau_update,
    recluster,
    reset_moments,
    score_update,
    split_learner,
)
from subspace_jax.represent.dynamic_subspace_learners.data import class_balanced_batches, shape_texture
from subspace_jax.represent.dynamic_subspace_learners.evaluate import attention_maps, draw_run, plot_attention
from subspace_jax.represent.dynamic_subspace_learners.model import (
    Embedded,
    NetworkConfig,
    SpatialAttention,
    SubspaceEmbedding,
    SubspaceLearners,
    make_learners,
)
from subspace_jax.represent.dynamic_subspace_learners.task import Schedule, SubspaceLearnersTask

__all__ = [
    "Embedded",
    "NetworkConfig",
    "PlateauState",
    "Schedule",
    "ScoreState",
    "SpatialAttention",
    "Split",
    "SubspaceEmbedding",
    "SubspaceLearners",
    "SubspaceLearnersTask",
    "attention_maps",
    "class_balanced_batches",
    "contiguous_learners",
    "draw_run",
    "fresh_learners",
    "init_plateau",
    "init_scores",
    "last_learner",
    "make_learners",
    "neuron_scores",
    "normalize_per_learner",
    "plateau_reached",
    "plateau_update",
    "plot_attention",
    "recluster",
    "reset_moments",
    "score_update",
    "shape_texture",
    "split_learner",
]


def __dir__():
    return __all__
