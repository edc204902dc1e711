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
from subspace_jax.train.intrinsic_dimension import (
    IntrinsicDimension,
    default_intrinsic,
    measure_config,
    measure_intrinsic_dimension,
    plot_intrinsic_dimension,
)
from subspace_jax.train.loop import Data, FitResult, evaluate, fit, writable_folder
from subspace_jax.train.metrics_log import MetricsLog, plot_curves, read_metrics
from subspace_jax.train.optimizer import make_optimizer, make_schedule
from subspace_jax.train.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    Rules,
    batch_sharding,
    check_batch_size,
    follow_params,
    gather,
    layer_gatherer,
    make_mesh,
    param_shardings,
    resolve,
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
from subspace_jax.train.subspace_task import SubspaceTask
from subspace_jax.train.task import Batch, Metrics, Task, module_arrays, split_module

__all__ = [
    "DEFAULT_RULES",
    "MESH_AXES",
    "Batch",
    "CheckpointMismatchError",
    "Checkpoints",
    "Data",
    "Experiment",
    "FitResult",
    "IntrinsicDimension",
    "Metrics",
    "MetricsLog",
    "Rules",
    "SubspaceTask",
    "Task",
    "TrainState",
    "adapter_recipe",
    "adapter_settings",
    "batch_sharding",
    "build",
    "check_batch_size",
    "complete_state",
    "default_adapter",
    "default_config",
    "default_intrinsic",
    "differing_fields",
    "evaluate",
    "evaluate_run",
    "fit",
    "follow_params",
    "gather",
    "init_state",
    "layer_gatherer",
    "load_config",
    "make_eval_step",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "measure_config",
    "measure_intrinsic_dimension",
    "module_arrays",
    "new_state",
    "override",
    "param_shardings",
    "plot_curves",
    "plot_intrinsic_dimension",
    "read_config",
    "read_metrics",
    "resolve",
    "restore",
    "run",
    "save_config",
    "split_module",
    "state_shardings",
    "to_device",
    "writable_folder",
]
