"""Gram matrices of the inputs of a causal language model's kernels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.linalg import GramState, update_gram
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.stacking import unstack_layers
from subspace_jax.nn.layers.structured import StructuredWeight
from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.model import causal_lm_apply

PyTree = Any
Name = tuple[int, str]  # a layer, and the path of a kernel in it


def kernel_inputs(config: CausalLMConfig) -> dict[str, str]:
    """Returns for the path of each kernel of a layer that of the first kernel with the same inputs.

    Examples:
      >>> kernel_inputs(CausalLMConfig.tiny())["attn/v"]
      'attn/q'
    """
    attention = ("attn/qkv",) if config.fused_qkv else ("attn/q", "attn/k", "attn/v")
    mlp = ("mlp/gate", "mlp/up") if config.gated_mlp else ("mlp/up",)
    first = {name: group[0] for group in (attention, mlp) for name in group}
    return {**{name: first[name] for name in attention}, "attn/out": "attn/out", **first, "mlp/down": "mlp/down"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Observed(StructuredWeight):
    """A kernel that adds its inputs to sums while a program is traced; only where no loop or remat surrounds it."""

    kernel: Any
    name: Name = field(metadata={"static": True})
    sums: dict = field(metadata={"static": True}, compare=False, hash=False)
    weights: jax.Array | None = None

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``."""
        self.sums[self.name] = update_gram(self.sums[self.name], x, self.weights)
        return linear(x, self.kernel)


def collect_grams(
    config: CausalLMConfig,
    params: PyTree,
    sums: Mapping[Name, GramState],
    batch: Mapping[str, jax.Array],
) -> dict[Name, GramState]:
    """Adds the inputs of some kernels on a batch; pure, for jit on any mesh.

    Layers are run one after the other, not by a scan, so that only the asked-for sums exist.

    Args:
      config: The model.
      params: Its parameters.
      sums: Sums so far, by layer and path of the kernel, such as ``(3, "mlp/down")``.
      batch: Rows of :func:`subspace_jax.data.text.pack_rows` with a ``mask``, see
        :func:`subspace_jax.data.eval_batches`; padding, whose segment is 0, does not count.

    Returns:
      The new sums.
    """
    params, new = unstack_layers(params), dict(sums)
    layers = list(params["layers"])
    weights = (batch["segment_ids"] > 0).astype(jnp.float32) * batch["mask"][:, None].astype(jnp.float32)
    for layer, path in sums:
        part, name = path.split("/")
        inner = layers[layer][part]
        observed = _Observed(inner[name]["kernel"], (layer, path), new, weights)
        layers[layer] = {**layers[layer], part: {**inner, name: {**inner[name], "kernel": observed}}}
    causal_lm_apply(
        config,
        {**params, "layers": tuple(layers)},
        batch["inputs"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        with_logits=False,
        dtype=jnp.float32,
    )
    return new
