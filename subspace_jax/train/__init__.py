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
from subspace_jax.train.intrinsic_dimension import (
    IntrinsicDimension,
    default_intrinsic,
    measure_config,
    measure_intrinsic_dimension,
    plot_intrinsic_dimension,
)
from subspace_jax.train.loop import Data, FitResult, evaluate, fit
from subspace_jax.train.metrics_log import MetricsLog, plot_curves, read_metrics
from subspace_jax.train.optimizer import make_optimizer, make_schedule
from subspace_jax.train.plan import Plan, mesh_sizes, plan_run, plan_step, usual_meshes
from subspace_jax.train.plan_chips import CHIPS, Chip, find_topology, topologies_of, tpu_devices
from subspace_jax.train.plan_cost import Collective, Cost, Temporary, module_cost
from subspace_jax.train.plan_flops import Products, count_products
from subspace_jax.train.plan_report import advice, best_plan, plan_text, plot_sweep, sweep_text
from subspace_jax.train.plan_roofline import Roofline, collective_seconds, roofline
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
    split_places,
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
from subspace_jax.train.survival import NotFiniteError, Preempted
from subspace_jax.train.task import Batch, Metrics, Task, module_arrays, split_module
from subspace_jax.train.workdir import replacing, writable_folder

__all__ = [
    "CHIPS",
    "DEFAULT_RULES",
    "MESH_AXES",
    "Batch",
    "CheckpointMismatchError",
    "Checkpoints",
    "Chip",
    "Cluster",
    "Collective",
    "Cost",
    "Data",
    "Experiment",
    "FitResult",
    "IntrinsicDimension",
    "Metrics",
    "MetricsLog",
    "NotFiniteError",
    "Plan",
    "Preempted",
    "Products",
    "Roofline",
    "Rules",
    "SubspaceTask",
    "Task",
    "Temporary",
    "TrainState",
    "adapter_recipe",
    "adapter_settings",
    "advice",
    "auto_mesh",
    "batch_sharding",
    "best_plan",
    "build",
    "check_batch_size",
    "collective_seconds",
    "complete_state",
    "count_products",
    "default_adapter",
    "default_config",
    "default_intrinsic",
    "differing_fields",
    "evaluate",
    "evaluate_run",
    "find_cluster",
    "find_topology",
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
    "measure_config",
    "measure_intrinsic_dimension",
    "mesh_axes",
    "mesh_sizes",
    "module_arrays",
    "module_cost",
    "new_state",
    "only_cpus",
    "override",
    "param_shardings",
    "plan_run",
    "plan_step",
    "plan_text",
    "plot_curves",
    "plot_intrinsic_dimension",
    "plot_sweep",
    "read_config",
    "read_metrics",
    "replacing",
    "resolve",
    "restore",
    "roofline",
    "run",
    "save_config",
    "split_module",
    "split_places",
    "state_shardings",
    "sweep_text",
    "to_device",
    "topologies_of",
    "tpu_devices",
    "usual_meshes",
    "writable_folder",
]
