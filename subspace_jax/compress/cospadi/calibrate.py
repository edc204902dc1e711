"""Gram matrices of the inputs of a language model's kernels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from subspace_jax import nn, train
from subspace_jax.compress.cospadi.gram import GramState, update_gram
from subspace_jax.nn import StructuredWeight

PyTree = Any
Name = tuple[int, str]  # a layer, and the path of a kernel in it


def kernel_inputs(config: nn.CausalLMConfig) -> dict[str, str]:
    """Returns for the path of each kernel of a layer that of the first kernel with the same inputs.

    Examples:
      >>> from subspace_jax import nn
      >>> kernel_inputs(nn.CausalLMConfig.tiny())["attn/v"]
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
        return nn.linear(x, self.kernel)


def collect_grams(
    config: nn.CausalLMConfig,
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
    params, new = nn.unstack_layers(params), dict(sums)
    layers = list(params["layers"])
    weights = (batch["segment_ids"] > 0).astype(jnp.float32) * batch["mask"][:, None].astype(jnp.float32)
    for layer, path in sums:
        part, name = path.split("/")
        inner = layers[layer][part]
        observed = _Observed(inner[name]["kernel"], (layer, path), new, weights)
        layers[layer] = {**layers[layer], part: {**inner, name: {**inner[name], "kernel": observed}}}
    nn.causal_lm_apply(
        config,
        {**params, "layers": tuple(layers)},
        batch["inputs"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        with_logits=False,
        dtype=jnp.float32,
    )
    return new


def grams_of_model(
    config: nn.CausalLMConfig,
    params: PyTree,
    names: Sequence[Name],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    *,
    total: int | None = None,
    progress: bool = True,
) -> dict[Name, GramState]:
    """Sums the inputs of kernels over one pass of the calibration text.

    A batch is summed in float32 on the devices, the batches in float64 on the host: Gram matrices have the square of
    the condition number of the activations, which exceeds what float32 holds.

    Args:
      config: The model.
      params: Its parameters, on the mesh.
      names: Layers and paths; kernels with equal inputs are named once, see :func:`kernel_inputs`.
      batches: Batches of rows, whose size the mesh divides.
      mesh: The mesh.
      total: Number of batches, for the progress bar.
      progress: Whether there is one.

    Returns:
      Sums of float64 on the host, by name.

    Raises:
      ValueError: There is no batch, or an activation is not finite.
    """
    widths = {name: _width(params, name) for name in names}
    whole = NamedSharding(mesh, P())

    def step(params, batch):
        return collect_grams(config, params, {name: GramState.zeros(d1) for name, d1 in widths.items()}, batch)

    step = train.jit_on_mesh(step, mesh, whole)
    rows, sums = train.batch_sharding(mesh), None
    for batch in tqdm(batches, "calibration", total=total, unit="batch", disable=None if progress else True):
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), step(params, train.to_device(batch, rows)))
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
    if sums is None:
        raise ValueError("batches: expected at least one batch of calibration text, got none")
    for (layer, path), state in sums.items():
        if not np.isfinite(state.gram).all():
            raise ValueError(f"layer {layer}, {path}: expected finite activations on the calibration text, got others")
    return sums


def _width(params: PyTree, name: Name) -> int:
    part, inner = name[1].split("/")
    return params["layers"][part][inner]["kernel"].shape[-2]
