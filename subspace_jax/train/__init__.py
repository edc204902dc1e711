"""Training: tasks, meshes and sharding rules, the one train step, the loop, checkpoints, configs, metrics."""

from subspace_jax.train.adapter_config import adapter_recipe, adapter_settings, default_adapter
from subspace_jax.train.checkpoints import CheckpointMismatchError, Checkpoints
from subspace_jax.train.config import (
    default_config,
    differing_fields,
    load_config,
    override,
    read_config,
    save_config,
)
from subspace_jax.train.experiment import Experiment, build, evaluate_run, restore, run
from subspace_jax.train.host_memory import keep_freed_memory, only_cpus
from subspace_jax.train.interruptions import NotFiniteError, Preempted
from subspace_jax.train.loop import Data, FitResult, evaluate, fit
from subspace_jax.train.metrics_log import MetricsLog, plot_curves, read_metrics
from subspace_jax.train.optimizer import make_optimizer, make_schedule
from subspace_jax.train.processes import Cluster, find_cluster, initialize
from subspace_jax.train.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    Rules,
    auto_mesh,
    batch_sharding,
    check_batch_size,
    follow_params,
    gather,
    jit_on_mesh,
    layer_gatherer,
    make_mesh,
    mesh_axes,
    param_shardings,
    resolve,
    shard_positions,
    to_device,
)
from subspace_jax.train.step import (
    TrainState,
    complete_state,
    init_state,
    make_eval_step,
    make_train_step,
    new_state,
    state_shardings,
)
from subspace_jax.train.task import Batch, Metrics, Task, module_arrays, split_module
from subspace_jax.train.workdir import replacing, writable_folder

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "Batch",
    "CheckpointMismatchError",
    "Checkpoints",
    "Cluster",
    "Data",
    "Experiment",
    "FitResult",
    "Metrics",
    "MetricsLog",
    "NotFiniteError",
    "Preempted",
    "Rules",
    "Task",
    "TrainState",
    "adapter_recipe",
    "adapter_settings",
    "auto_mesh",
    "batch_sharding",
    "build",
    "check_batch_size",
    "complete_state",
    "default_adapter",
    "default_config",
    "differing_fields",
    "evaluate",
    "evaluate_run",
    "find_cluster",
    "fit",
    "follow_params",
    "gather",
    "init_state",
    "initialize",
    "jit_on_mesh",
    "keep_freed_memory",
    "layer_gatherer",
    "load_config",
    "make_eval_step",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "mesh_axes",
    "module_arrays",
    "new_state",
    "only_cpus",
    "override",
    "param_shardings",
    "plot_curves",
    "read_config",
    "read_metrics",
    "replacing",
    "resolve",
    "restore",
    "run",
    "save_config",
    "shard_positions",
    "split_module",
    "state_shardings",
    "to_device",
    "writable_folder",
]
