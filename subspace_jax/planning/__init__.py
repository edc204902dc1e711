"""Planning: ahead-of-time compilation of a run's programs for a named topology, and their cost."""

from subspace_jax.planning.chips import CHIPS, Chip, find_topology, topologies_of, tpu_devices
from subspace_jax.planning.cost import Collective, Cost, Temporary, module_cost
from subspace_jax.planning.flops import MatmulFlops, count_matmul_flops
from subspace_jax.planning.local import plan_here
from subspace_jax.planning.meshes import mesh_sizes, usual_meshes
from subspace_jax.planning.plan import Plan, plan_evaluation, plan_run, plan_step
from subspace_jax.planning.report import advice, best_plan, memory_text, plan_text, plot_sweep, sweep_text
from subspace_jax.planning.roofline import Roofline, collective_seconds, roofline

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "Cost",
    "MatmulFlops",
    "Plan",
    "Roofline",
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
    "plan_run",
    "plan_step",
    "plan_text",
    "plot_sweep",
    "roofline",
    "sweep_text",
    "topologies_of",
    "tpu_devices",
    "usual_meshes",
]


def __dir__():
    return __all__
