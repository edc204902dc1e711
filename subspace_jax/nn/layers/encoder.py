"""Transformer encoders with stacked layers, shared by image and text encoders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.nn.layers.activations import ACTIVATIONS
from subspace_jax.nn.layers.drop_path import drop_path as drop_branch
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.mlp import mlp
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.stacking import DEFAULT_OPTIONS, LayerOptions, captured_states, run_layers
from subspace_jax.nn.params import ParamSpec, dense_specs, map_specs, norm_specs

PyTree = Any


@dataclass(frozen=True)
class Encoder:
    """Layers ``x += g1 * attn(norm(x)); x += g2 * mlp(norm(x))`` with layer norms.

    With ``post_norm`` they are ``x = norm(x + g1 * attn(x)); x = norm(x + g2 * mlp(x))``, as in BERT.

    Attributes:
      width: Width of the residual stream, ``d``.
      num_layers: Number of layers, ``L``.
      num_heads: Number of heads, of width ``d / num_heads``.
      mlp_size: Inner width of the perceptron, ``f``.
      norm_eps: Epsilon of the norms.
      activation: One of "gelu" (exact), "gelu_tanh", "quick_gelu", "silu", "relu", "tanh".
      gated_mlp: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
      fused_qkv: One kernel for queries, keys and values, in this order along its output.
      qkv_bias: Whether queries, keys and values have biases.
      layer_scale: Whether the branches are scaled by features, ``g1`` and ``g2`` (LayerScale, arXiv 2103.17239).
      causal: Whether attention is causal.
      post_norm: Whether the sums are normalized instead of the inputs of the branches.
    """

    width: int
    num_layers: int
    num_heads: int
    mlp_size: int
    norm_eps: float
    activation: str = "gelu"
    gated_mlp: bool = False
    fused_qkv: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    causal: bool = False
    post_norm: bool = False

    def __post_init__(self):
        for name in ("width", "num_layers", "num_heads", "mlp_size"):
            check_size(name, getattr(self, name))
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of the width {self.width}, got {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {self.activation!r}")


def check_size(name: str, value: Any) -> None:
    """Raises ``ValueError`` unless ``value`` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def encoder_specs(encoder: Encoder) -> PyTree:
    """Returns the specs of the stacked parameters.

    ::

        attn_norm/{scale, bias}       [L, d]
        attn/{q, k, v}/{kernel, bias} [L, d, d]    or attn/qkv [L, d, 3 d] with fused_qkv
        attn/out/{kernel, bias}       [L, d, d]
        attn_gain/scale               [L, d]       layer_scale only
        mlp_norm/{scale, bias}        [L, d]
        mlp/{gate, up}/{kernel, bias} [L, d, f]    gate with gated_mlp only
        mlp/down/{kernel, bias}       [L, f, d]
        mlp_gain/scale                [L, d]       layer_scale only
    """
    d, f = encoder.width, encoder.mlp_size
    # Scaled down, so that the variance of the residual stream does not grow with its 2 L additions.
    added = 0.02 / math.sqrt(2 * encoder.num_layers)
    into, bias = ("embed", "heads"), encoder.qkv_bias
    if encoder.fused_qkv:
        attn = {"qkv": dense_specs(d, 3 * d, into, bias=bias)}
    else:
        attn = {name: dense_specs(d, d, into, bias=bias) for name in ("q", "k", "v")}
    attn["out"] = dense_specs(d, d, ("heads", "embed"), stddev=added)
    ups = ("gate", "up") if encoder.gated_mlp else ("up",)
    mlp = {name: dense_specs(d, f, ("embed", "mlp")) for name in ups}
    mlp["down"] = dense_specs(f, d, ("mlp", "embed"), stddev=added)
    specs = {"attn_norm": norm_specs(d), "attn": attn, "mlp_norm": norm_specs(d), "mlp": mlp}
    if encoder.layer_scale:
        for name in ("attn_gain", "mlp_gain"):
            specs[name] = {"scale": ParamSpec((d,), (None,), value=1e-4)}

    def stacked(spec: ParamSpec) -> ParamSpec:
        return spec._replace(shape=(encoder.num_layers, *spec.shape), axes=("layers", *spec.axes))

    return map_specs(stacked, specs)


def encode(
    encoder: Encoder,
    layers: PyTree,
    x: jax.Array,
    *,
    mask: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    drop_path: tuple[Sequence[float], jax.Array | None] | None = None,
    options: LayerOptions = DEFAULT_OPTIONS,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs all layers.

    Args:
      encoder: The config.
      layers: Parameters as laid out by :func:`encoder_specs`, or a tuple of those of each layer.
      x: ``[batch, tokens, d]``.
      mask: ``[batch or 1, 1, tokens, tokens]`` bool, True where a query (third axis) attends to a key; it replaces
        ``encoder.causal``.
      capture: Indices of the hidden states to return, or "all": 0 is ``x``, ``l`` the output of layer ``l``; negative
        indices count from the end.
      drop_path: Rates of stochastic depth, one per layer, and their random key.
      options: How the layers run.

    Returns:
      The stream after the last layer, and the captured states in the order of depth.

    Raises:
      ValueError: An index of ``capture`` is out of range, or ``drop_path`` has no key.
    """
    wanted = captured_states(capture, encoder.num_layers + 1)
    rates, key = drop_path or ((), None)
    dropping = any(rates)
    if dropping and key is None:
        raise ValueError("key: stochastic depth needs a random key, got None")

    def block(carry, layer, own):
        x, kept = carry
        for index, name in enumerate(("attn", "mlp")):
            own_norm = layer[f"{name}_norm"]["scale"], layer[f"{name}_norm"]["bias"], encoder.norm_eps
            y = x if encoder.post_norm else layer_norm(x, *own_norm)
            if name == "attn":
                y = _attention(encoder, layer["attn"], y, mask, options)
            else:
                y = mlp(layer["mlp"], y, encoder.activation)
            if encoder.layer_scale:
                y = y * layer[f"{name}_gain"]["scale"].astype(y.dtype).reshape(1, 1, -1)
            if dropping:
                y = drop_branch(jax.random.fold_in(own["key"], index), y, own["rate"])
            x = layer_norm(x + y, *own_norm) if encoder.post_norm else x + y
        x = options.on_stream(x)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, own["slot"], 0)
        return (x, kept), None

    others, kept, first = {}, None, ()
    if dropping:
        others["rate"] = jnp.asarray(rates, jnp.float32)
        others["key"] = jax.random.split(key, encoder.num_layers)
    if wanted and wanted[0] == 0:
        first, wanted = (x,), wanted[1:]
    if wanted:
        # A slot for each captured state, and a last one that the others overwrite.
        slots = {entry: i for i, entry in enumerate(wanted)}
        order = [slots.get(layer, len(wanted)) for layer in range(1, encoder.num_layers + 1)]
        others["slot"] = jnp.array(order, jnp.int32)
        kept = jnp.broadcast_to(x[None], (len(wanted) + 1, *x.shape))
    (x, kept), _ = run_layers(block, (x, kept), layers, others, options)
    return x, first + tuple(kept[i] for i in range(len(wanted)))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """``[..., d]`` to ``[..., heads, d / heads]``."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _attention(encoder: Encoder, params: PyTree, x: jax.Array, mask, options: LayerOptions) -> jax.Array:
    def project(x: jax.Array, name: str) -> jax.Array:
        return linear(x, params[name]["kernel"], params[name].get("bias"))

    parts = jnp.split(project(x, "qkv"), 3, axis=-1) if encoder.fused_qkv else [project(x, name) for name in "qkv"]
    query, key, value = (split_heads(part, encoder.num_heads) for part in parts)
    mixed = options.attend_with(query, key, value, mask=mask, causal=encoder.causal)
    return project(mixed.reshape(x.shape), "out")
