"""Planning: ahead-of-time compilation of a train step for a named topology, and what it costs there."""

from subspace_jax.planning.chips import CHIPS, Chip, find_topology, topologies_of, tpu_devices
from subspace_jax.planning.cost import Collective, Cost, Temporary, module_cost
from subspace_jax.planning.flops import Products, count_products
from subspace_jax.planning.plan import Plan, mesh_sizes, plan_run, plan_step, usual_meshes
from subspace_jax.planning.report import advice, best_plan, plan_text, plot_sweep, sweep_text
from subspace_jax.planning.roofline import Roofline, collective_seconds, roofline

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "Cost",
    "Plan",
    "Products",
    "Roofline",
    "Temporary",
    "advice",
    "best_plan",
    "collective_seconds",
    "count_products",
    "find_topology",
    "mesh_sizes",
    "module_cost",
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
