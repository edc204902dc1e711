"""Planning: ahead-of-time compilation of a run's programs for a named topology, and their cost."""

from subspace_jax.planning.cache import plan_key, read_plans, write_plans
from subspace_jax.planning.chips import CHIPS, Chip, find_topology, topologies_of, tpu_devices
from subspace_jax.planning.cost import Collective, Cost, module_cost
from subspace_jax.planning.flops import MatmulFlops, count_matmul_flops
from subspace_jax.planning.local import plan_here
from subspace_jax.planning.meshes import mesh_sizes, usual_meshes
from subspace_jax.planning.plan import Program, plan_evaluation, plan_programs, plan_run, plan_step
from subspace_jax.planning.progress import waiting
from subspace_jax.planning.record import Plan, Speed
from subspace_jax.planning.report import advice, best_plan, memory_text, plan_text, plot_sweep, sweep_text
from subspace_jax.planning.roofline import Roofline, collective_seconds, roofline
from subspace_jax.planning.temporaries import Temporary

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "Cost",
    "MatmulFlops",
    "Plan",
    "Program",
    "Roofline",
    "Speed",
    "Temporary",
    "advice",
    "best_plan",
    "collective_seconds",
    "count_matmul_flops",
    "find_topology",
    "memory_text",
    "mesh_sizes",
    "module_cost",
    "plan_evaluation",
    "plan_here",
    "plan_key",
    "plan_programs",
    "plan_run",
    "plan_step",
    "plan_text",
    "plot_sweep",
    "read_plans",
    "roofline",
    "sweep_text",
    "topologies_of",
    "tpu_devices",
    "usual_meshes",
    "waiting",
    "write_plans",
]


def __dir__():
    return __all__
