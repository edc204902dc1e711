"""Experts that tasks share and add to: a reconstruction of iGSP from its abstract (arXiv 2605.19301)."""

from subspace_jax.continual.igsp.classes import ClassStream
from subspace_jax.continual.igsp.clip import ClipStream
from subspace_jax.continual.igsp.core import (
    Router,
    complement_penalty,
    historical_basis,
    init_router,
    moe_lora_apply,
    orthogonal_complement_updates,
    route,
    router_converged,
    subspace_penalty,
)
from subspace_jax.continual.igsp.model import ExpertKernel, MoELoRADense
from subspace_jax.continual.igsp.phases import Optimizers, TaskConfig, fit_task, learnt_state, task_phases
from subspace_jax.continual.igsp.pool import (
    ExpertPool,
    ParameterCounts,
    Pruned,
    candidate_mask,
    expand_pool,
    freeze_pool,
    init_pool,
    parameter_counts,
    prune_pool,
)
from subspace_jax.continual.igsp.state import ContinualState, ExpertSettings, Site
from subspace_jax.continual.igsp.stats import NearestTask, TaskStats, add_task, init_task_stats, nearest_task
from subspace_jax.continual.igsp.stream import ExpertStream
from subspace_jax.metrics import mtil_metrics

__all__ = [
    "ClassStream",
    "ClipStream",
    "ContinualState",
    "ExpertKernel",
    "ExpertPool",
    "ExpertSettings",
    "ExpertStream",
    "MoELoRADense",
    "NearestTask",
    "Optimizers",
    "ParameterCounts",
    "Pruned",
    "Router",
    "Site",
    "TaskConfig",
    "TaskStats",
    "add_task",
    "candidate_mask",
    "complement_penalty",
    "expand_pool",
    "fit_task",
    "freeze_pool",
    "historical_basis",
    "init_pool",
    "init_router",
    "init_task_stats",
    "learnt_state",
    "moe_lora_apply",
    "mtil_metrics",
    "nearest_task",
    "orthogonal_complement_updates",
    "parameter_counts",
    "prune_pool",
    "route",
    "router_converged",
    "subspace_penalty",
    "task_phases",
]


def __dir__():
    return __all__
