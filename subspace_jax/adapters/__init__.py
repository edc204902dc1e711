"""Adapters of frozen models: name the weights, choose a method, train, merge.

``init`` draws a small trainable tree beside the parameters; ``bind`` puts both together for the models of
:mod:`subspace_jax.nn`, and ``materialize`` for any other.
"""

from subspace_jax.adapters.dora import DoRA, DoRAWeight
from subspace_jax.adapters.effort import Effort, EffortWeight
from subspace_jax.adapters.energies import add_energy_probes, drop_energy_probes
from subspace_jax.adapters.full import Full
from subspace_jax.adapters.lora import LoRA, LoRAWeight
from subspace_jax.adapters.lora_ga import lora_ga_init
from subspace_jax.adapters.rules import match_rules
from subspace_jax.adapters.surface import (
    bind,
    count,
    describe,
    init,
    label_fn,
    logical_axes,
    materialize,
    merge,
    prepare,
    unmerge,
)
from subspace_jax.adapters.svfit import SpectralBase, SpectralBases, SVFit, SVFitWeight, energy_rank

__all__ = [
    "DoRA",
    "DoRAWeight",
    "Effort",
    "EffortWeight",
    "Full",
    "LoRA",
    "LoRAWeight",
    "SVFit",
    "SVFitWeight",
    "SpectralBase",
    "SpectralBases",
    "add_energy_probes",
    "bind",
    "count",
    "describe",
    "drop_energy_probes",
    "energy_rank",
    "init",
    "label_fn",
    "logical_axes",
    "lora_ga_init",
    "match_rules",
    "materialize",
    "merge",
    "prepare",
    "unmerge",
]
