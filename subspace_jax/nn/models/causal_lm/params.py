"""The parameters of a causal language model: one table of shapes, logical axes and initial values."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.params import ParamSpec, draw_params, spec_axes, spec_count, spec_shapes

PyTree = Any


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
    return spec_axes(causal_lm_specs(config))


def causal_lm_shapes(config: CausalLMConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns every parameter as a ``ShapeDtypeStruct``."""
    return spec_shapes(causal_lm_specs(config), dtype)


def causal_lm_init(key: jax.Array, config: CausalLMConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Draws fresh parameters: normal with deviation 0.02 (less where a block adds to the stream), norms 1, biases 0.

    Args:
      key: Random key.  A parameter's values depend on the key, its name and its shape, and on no other parameter.
      config: The model.
      dtype: Type of the parameters.

    Returns:
      Nested dict of arrays, as :func:`causal_lm_specs` lays them out.
    """
    return draw_params(key, causal_lm_specs(config), dtype)


def count_params(config: CausalLMConfig) -> int:
    """Number of parameters of a model."""
    return spec_count(causal_lm_specs(config))


def untie_causal_lm(config: CausalLMConfig, params: PyTree) -> tuple[CausalLMConfig, PyTree]:
    """Gives a model whose head is its embedding a head of its own, with the same numbers.

    What changes the one then leaves the other: an adapter of Hugging Face PEFT, say.

    Args:
      config: The model.
      params: Its parameters, plain arrays.

    Returns:
      The config with ``tied`` false, and the parameters with ``head/kernel [d, V]``; both as they came if the model
      has a head already.
    """
    if not config.tied:
        return config, params
    return config.replace(tied=False), {**params, "head": {"kernel": params["embed"]["embedding"].T}}
