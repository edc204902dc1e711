"""The parameters of a causal language model: one table of shapes, logical axes and initial values."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax.nn.causal_lm_config import CausalLMConfig

PyTree = Any


class ParamSpec(NamedTuple):
    """One parameter before it exists.

    Attributes:
      shape: Its shape.
      axes: Logical name of each axis, or None for one that is never split.
      stddev: Standard deviation of the initial values; None for a parameter that begins constant.
      value: The constant.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float | None = None
    value: float = 0.0


def causal_lm_specs(config: CausalLMConfig) -> PyTree:
    """Describes every parameter: a nested dict of :class:`ParamSpec` with the layout of the parameters.

    ::

        embed/embedding                     [V, d]
        position/embedding                  [max_length, d]      learned positions only
        layers/attn_norm/{scale, bias}      [L, d]               bias with norm = "layer" only
        layers/attn/{q, k, v}/{kernel, bias} [L, d, H h] or [L, d, K h]
        layers/attn/qkv/{kernel, bias}      [L, d, (H + 2 K) h]  fused_qkv only, instead of the three
        layers/attn/out/{kernel, bias}      [L, H h, d]
        layers/mlp_norm/{scale, bias}       [L, d]
        layers/mlp/{gate, up}/{kernel, bias} [L, d, f]           gate with gated_mlp only
        layers/mlp/down/{kernel, bias}      [L, f, d]
        norm/{scale, bias}                  [d]
        head/kernel                         [d, V]               untied only

    Args:
      config: The model.
    """
    d, f, v, n = config.hidden_size, config.mlp_size, config.vocab_size, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # What is added to the residual stream 2 n times is made smaller, so that its variance does not grow (GPT-2).
    usual, added = 0.02, 0.02 / math.sqrt(2 * n)

    def dense(m: int, k: int, axes: tuple[str, str], bias: bool, stddev: float = usual) -> dict[str, ParamSpec]:
        spec = {"kernel": ParamSpec((n, m, k), ("layers", *axes), stddev)}
        return {**spec, "bias": ParamSpec((n, k), ("layers", axes[1]))} if bias else spec

    def norm(*lead: tuple[int, str]) -> dict[str, ParamSpec]:
        shape, axes = (*(size for size, _ in lead), d), (*(name for _, name in lead), None)
        spec = {"scale": ParamSpec(shape, axes, value=1.0)}
        return {**spec, "bias": ParamSpec(shape, axes)} if config.norm == "layer" else spec

    into, out = ("embed", "heads"), ("heads", "embed")
    if config.fused_qkv:
        attn = {"qkv": dense(d, queries + 2 * keys, into, config.qkv_bias)}
    else:
        widths = {"q": queries, "k": keys, "v": keys}
        attn = {name: dense(d, width, into, config.qkv_bias) for name, width in widths.items()}
    attn["out"] = dense(queries, d, out, config.out_bias, added)

    ups = ("gate", "up") if config.gated_mlp else ("up",)
    mlp = {name: dense(d, f, ("embed", "mlp"), config.mlp_bias) for name in ups}
    mlp["down"] = dense(f, d, ("mlp", "embed"), config.mlp_bias, added)

    layer = (n, "layers")
    specs = {
        "embed": {"embedding": ParamSpec((v, d), ("vocab", "embed"), usual)},
        "layers": {"attn_norm": norm(layer), "attn": attn, "mlp_norm": norm(layer), "mlp": mlp},
        "norm": norm(),
    }
    if config.rope is None:
        specs["position"] = {"embedding": ParamSpec((config.max_length, d), (None, "embed"), usual)}
    if not config.tied:
        specs["head"] = {"kernel": ParamSpec((d, v), ("embed", "vocab"), usual)}
    return specs


def causal_lm_axes(config: CausalLMConfig) -> PyTree:
    """Returns the logical axis names of every parameter, a tree of ``PartitionSpec``."""
    return _map_specs(lambda spec: P(*spec.axes), config)


def causal_lm_shapes(config: CausalLMConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns every parameter as a ``ShapeDtypeStruct``."""
    return _map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), config)


def causal_lm_init(key: jax.Array, config: CausalLMConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Draws fresh parameters: normal with deviation 0.02 (less where a block adds to the stream), norms 1, biases 0.

    Args:
      key: Random key.  A parameter's values depend on the key, its name and its shape, and on no other parameter.
      config: The model.
      dtype: Type of the parameters.

    Returns:
      Nested dict of arrays, as :func:`causal_lm_specs` lays them out.
    """

    def draw(path, spec: ParamSpec) -> jax.Array:
        if spec.stddev is None:
            return jnp.full(spec.shape, spec.value, dtype)
        name = "/".join(entry.key for entry in path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (spec.stddev * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, causal_lm_specs(config), is_leaf=_is_spec)


def count_params(config: CausalLMConfig) -> int:
    """Number of parameters of a model."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(causal_lm_specs(config), is_leaf=_is_spec))


def _map_specs(f: Callable[[ParamSpec], Any], config: CausalLMConfig) -> PyTree:
    return jax.tree.map(f, causal_lm_specs(config), is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)
