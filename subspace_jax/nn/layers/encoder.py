"""Pre-norm transformer blocks, stacked by layer: what the towers for images and for texts have in common."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.nn.layers.attention import attention
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.stacking import REMAT, run_layers
from subspace_jax.nn.models.causal_lm.config import ACTIVATIONS as _ACTIVATIONS
from subspace_jax.nn.params import ParamSpec, dense_specs, norm_specs

PyTree = Any

ACTIVATIONS = {**_ACTIVATIONS, "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class Encoder:
    """A stack of blocks ``x += g1 * attn(norm(x)); x += g2 * mlp(norm(x))`` with layer norms.

    Attributes:
      width: Width of the residual stream, ``d``.
      num_layers: Blocks, ``L``.
      num_heads: Heads of width ``d / num_heads``.
      mlp_size: Width inside the perceptron, ``f``.
      norm_eps: Epsilon of the norms.
      activation: One of "gelu" (exact), "gelu_tanh", "quick_gelu", "silu", "relu", "tanh".
      gated_mlp: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
      fused_qkv: One kernel for queries, keys and values, in this order along its output.
      qkv_bias: Whether queries, keys and values have biases.
      layer_scale: Whether what a branch adds is scaled by features, ``g1`` and ``g2`` (arXiv 2103.17239).
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

    def __post_init__(self):
        for name in ("width", "num_layers", "num_heads", "mlp_size"):
            check_size(name, getattr(self, name))
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of the width {self.width}, got {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {self.activation!r}")


def check_size(name: str, value: Any) -> None:
    """Raises ``ValueError`` for what is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def encoder_specs(encoder: Encoder) -> PyTree:
    """Describes the parameters of all blocks, stacked.

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
    # What is added to the residual stream 2 L times is made smaller, so that its variance does not grow.
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

    return jax.tree.map(stacked, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def encode(
    encoder: Encoder,
    layers: PyTree,
    x: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    capture: Sequence[int] = (),
    drop_path: Sequence[float] | None = None,
    key: jax.Array | None = None,
    remat: str = "none",
    on_layer: Callable[[PyTree], PyTree] | None = None,
    on_stream: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
    unroll: int = 1,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs all blocks, by ``jax.lax.scan`` where they are stacked.

    Args:
      encoder: The blocks.
      layers: Their parameters, as :func:`encoder_specs` lays them out, or a tuple of those of each block.
      x: ``[batch, tokens, d]``.
      mask: ``[batch or 1, 1, tokens, tokens]`` bool, True where a query (third axis) sees a key.
      causal: Without a mask: whether a token sees itself and earlier ones only.
      capture: Entries of the list of hidden states that are wanted; 0 is ``x``, ``l`` what block ``l`` leaves, and
        negative ones count from the end.
      drop_path: For each block the probability that it passes a sample's stream on unchanged (arXiv 1603.09382).
      key: Random key of those decisions.
      remat: What the backward pass finds of each block: "none", "dots" or "full" (nothing but its input).
      on_layer: Applied to the parameters of one block where it is run.
      on_stream: Applied to the stream after every block.
      implementation: Of attention.
      unroll: Blocks in a step of the loop.

    Returns:
      The stream after the last block, and the captured states in the order of depth.

    Raises:
      ValueError: ``remat`` is unknown, an entry of ``capture`` does not exist, or ``drop_path`` has no key.
    """
    if remat not in REMAT:
        raise ValueError(f"remat: expected one of {sorted(REMAT)}, got {remat!r}")
    wanted = captured_entries(capture, encoder.num_layers)
    dropping = drop_path is not None and any(drop_path)
    if dropping and key is None:
        raise ValueError("key: dropping paths needs a random key")
    on_stream = on_stream or (lambda x: x)

    def block(carry, xs):
        x, kept = carry
        layer = on_layer(xs["params"]) if on_layer is not None else xs["params"]
        shown = layer_norm(x, layer["attn_norm"]["scale"], layer["attn_norm"]["bias"], encoder.norm_eps)
        attn = _attention(encoder, layer["attn"], shown, mask, causal, implementation)
        x = x + _branch(layer.get("attn_gain"), attn, xs, 0)
        shown = layer_norm(x, layer["mlp_norm"]["scale"], layer["mlp_norm"]["bias"], encoder.norm_eps)
        x = x + _branch(layer.get("mlp_gain"), mlp(layer["mlp"], shown, encoder.activation), xs, 1)
        x = on_stream(x)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, xs["slot"], 0)
        return (x, kept), None

    others, kept, first = {}, None, ()
    if dropping:
        others["keep"] = 1.0 - jnp.asarray(drop_path, jnp.float32)
        others["keys"] = jax.random.split(key, encoder.num_layers)
    if wanted and wanted[0] == 0:
        first, wanted = (x,), wanted[1:]
    if wanted:
        # One place for each state that is wanted, and a last one that takes all others.
        slots = {entry: i for i, entry in enumerate(wanted)}
        order = [slots.get(layer, len(wanted)) for layer in range(1, encoder.num_layers + 1)]
        others["slot"] = jnp.array(order, jnp.int32)
        kept = jnp.broadcast_to(x[None], (len(wanted) + 1, *x.shape))
    (x, kept), _ = run_layers(block, (x, kept), layers, others, remat=remat, unroll=unroll)
    return x, first + tuple(kept[i] for i in range(len(wanted)))


def captured_entries(capture: Sequence[int], num_layers: int) -> list[int]:
    """Entries of the ``num_layers + 1`` hidden states, ascending and without repetition."""
    if strange := [e for e in capture if not -num_layers - 1 <= e <= num_layers]:
        raise ValueError(f"capture: there are hidden states 0 to {num_layers}, got {strange}")
    return sorted({int(e) % (num_layers + 1) for e in capture})


def mlp(params: PyTree, x: jax.Array, activation: str) -> jax.Array:
    """Two linear maps around an activation; three where there is a gate."""
    # Made again from its input in the backward pass, as norms and attention weights are.
    act = jax.checkpoint(ACTIVATIONS[activation], prevent_cse=False)
    inner = linear(x, params["up"]["kernel"], params["up"].get("bias"))
    if "gate" in params:
        inner = act(linear(x, params["gate"]["kernel"], params["gate"].get("bias"))) * inner
    else:
        inner = act(inner)
    return linear(inner, params["down"]["kernel"], params["down"].get("bias"))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """``[..., d]`` to ``[..., heads, d / heads]``."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _attention(encoder: Encoder, params: PyTree, x: jax.Array, mask, causal: bool, implementation) -> jax.Array:
    if encoder.fused_qkv:
        fused = linear(x, params["qkv"]["kernel"], params["qkv"].get("bias"))
        parts = jnp.split(fused, 3, axis=-1)
    else:
        parts = [linear(x, params[name]["kernel"], params[name].get("bias")) for name in ("q", "k", "v")]
    query, key, value = (split_heads(part, encoder.num_heads) for part in parts)
    mixed = attention(query, key, value, mask=mask, causal=causal, implementation=implementation)
    return linear(mixed.reshape(x.shape), params["out"]["kernel"], params["out"].get("bias"))


def _branch(gain: PyTree | None, y: jax.Array, xs: PyTree, index: int) -> jax.Array:
    """Scales what a branch adds, and leaves it out for some samples."""
    if gain is not None:
        y = y * gain["scale"].astype(y.dtype).reshape(1, 1, -1)
    if "keep" not in xs:
        return y
    keep = xs["keep"]
    stays = jax.random.bernoulli(jax.random.fold_in(xs["keys"], index), keep, (y.shape[0], 1, 1))
    return jnp.where(stays, y / keep.astype(y.dtype), jnp.zeros((), y.dtype))
