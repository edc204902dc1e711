"""Training: tasks, meshes and sharding rules, the one train step, the loop, checkpoints, configs, metrics."""

import subspace_jax._train_extra  # noqa: F401
from subspace_jax.train.adapter_config import adapter_recipe, adapter_settings, default_adapter
from subspace_jax.train.checkpoints import CheckpointMismatchError, Checkpoints, Record
from subspace_jax.train.config import (
    default_config,
    differing_fields,
    load_config,
    override,
    read_config,
    save_config,
)
from subspace_jax.train.context import (
    all_gather_params,
    constrain,
    current_mesh,
    current_rules,
    gathered,
    jit_on_mesh,
    mesh_axes,
    use_mesh,
)
from subspace_jax.train.curves import plot_curves
from subspace_jax.train.decoupling_config import decoupler_of, default_decoupling
from subspace_jax.train.evaluators import Evaluations, Evaluator, TaskEvaluator, evaluate
from subspace_jax.train.experiment import Restored, build, evaluate_run, restore, run
from subspace_jax.train.hook import Hook
from subspace_jax.train.interruptions import NotFiniteError, Preempted
from subspace_jax.train.loop import FitResult, fit
from subspace_jax.train.metrics_log import MetricsLog, read_metrics
from subspace_jax.train.optimizer import make_optimizer, make_schedule
from subspace_jax.train.phases import At, DataSpec, Phase, Run, array_data, batch_shapes, outlined, whole_set_data
from subspace_jax.train.processes import Cluster, find_cluster, initialize
from subspace_jax.train.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    Rules,
    auto_mesh,
    batch_sharding,
    check_batch_size,
    make_mesh,
    opt_state_shardings,
    param_shardings,
    to_device,
    to_partition_spec,
)
from subspace_jax.train.state import (
    TrainState,
    complete_state,
    init_state,
    new_state,
    saved_part,
    state_shardings,
)
from subspace_jax.train.step import jit_train_step, make_train_step
from subspace_jax.train.summary import run_summary
from subspace_jax.train.task import Batch, Metrics, Task, module_arrays, split_module
from subspace_jax.train.workdir import replacing, writable_folder

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "At",
    "Batch",
    "CheckpointMismatchError",
    "Checkpoints",
    "Cluster",
    "DataSpec",
    "Evaluations",
    "Evaluator",
    "FitResult",
    "Hook",
    "Metrics",
    "MetricsLog",
    "NotFiniteError",
    "Phase",
    "Preempted",
    "Record",
    "Restored",
    "Rules",
    "Run",
    "Task",
    "TaskEvaluator",
    "TrainState",
    "adapter_recipe",
    "adapter_settings",
    "all_gather_params",
    "array_data",
    "auto_mesh",
    "batch_shapes",
    "batch_sharding",
    "build",
    "check_batch_size",
    "complete_state",
    "constrain",
    "current_mesh",
    "current_rules",
    "decoupler_of",
    "default_adapter",
    "default_config",
    "default_decoupling",
    "differing_fields",
    "evaluate",
    "evaluate_run",
    "find_cluster",
    "fit",
    "gathered",
    "init_state",
    "initialize",
    "jit_on_mesh",
    "jit_train_step",
    "load_config",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "mesh_axes",
    "module_arrays",
    "new_state",
    "opt_state_shardings",
    "outlined",
    "override",
    "param_shardings",
    "plot_curves",
    "read_config",
    "read_metrics",
    "replacing",
    "restore",
    "run",
    "run_summary",
    "save_config",
    "saved_part",
    "split_module",
    "state_shardings",
    "to_device",
    "to_partition_spec",
    "use_mesh",
    "whole_set_data",
    "writable_folder",
]


def __dir__():
    return __all__
