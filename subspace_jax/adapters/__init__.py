"""Adapters of frozen models: select weights, choose a method, train, merge.

``init`` draws a small trainable tree beside the parameters; ``bind`` combines both for the models of
:mod:`subspace_jax.nn`, and ``materialize`` for any other model.
"""

from subspace_jax.adapters.api import (
    bind,
    init,
    logical_axes,
    materialize,
    merge,
    prepare,
    roles,
    unmerge,
)
from subspace_jax.adapters.config import AdapterConfig, LowRankUpdate
from subspace_jax.adapters.convolution import ConvDoRAWeight, ConvLoRAWeight
from subspace_jax.adapters.dora import DoRA, DoRAWeight
from subspace_jax.adapters.effort import Effort, EffortBase, EffortWeight, PrincipalBases
from subspace_jax.adapters.effort_penalty import effort_penalty, energy_loss, orthogonality_loss
from subspace_jax.adapters.flora import FLoRA, FLoRAWeight
from subspace_jax.adapters.full import Full
from subspace_jax.adapters.gradient_probes import add_gradient_probes, drop_gradient_probes
from subspace_jax.adapters.lora import LoRA, LoRAWeight
from subspace_jax.adapters.lora_init import lora_ga_factors
from subspace_jax.adapters.multi_adapter import (
    MultiAdapterWeight,
    bind_multi_adapter,
    combine,
    with_adapter_indices,
)
from subspace_jax.adapters.quantized import Int8Weight, dequantize, quantize
from subspace_jax.adapters.rules import match_rules
from subspace_jax.adapters.structured import StructuredWeight
from subspace_jax.adapters.summary import count, describe, label_fn
from subspace_jax.adapters.svfit import SpectralBase, SpectralBases, SVFit, SVFitWeight, energy_rank

__all__ = [
    "AdapterConfig",
    "ConvDoRAWeight",
    "ConvLoRAWeight",
    "DoRA",
    "DoRAWeight",
    "Effort",
    "EffortBase",
    "EffortWeight",
    "FLoRA",
    "FLoRAWeight",
    "Full",
    "Int8Weight",
    "LoRA",
    "LoRAWeight",
    "LowRankUpdate",
    "MultiAdapterWeight",
    "PrincipalBases",
    "SVFit",
    "SVFitWeight",
    "SpectralBase",
    "SpectralBases",
    "StructuredWeight",
    "add_gradient_probes",
    "bind",
    "bind_multi_adapter",
    "combine",
    "count",
    "dequantize",
    "describe",
    "drop_gradient_probes",
    "effort_penalty",
    "energy_loss",
    "energy_rank",
    "init",
    "label_fn",
    "logical_axes",
    "lora_ga_factors",
    "match_rules",
    "materialize",
    "merge",
    "orthogonality_loss",
    "prepare",
    "quantize",
    "roles",
    "unmerge",
    "with_adapter_indices",
]


def __dir__():
    return __all__
