"""The parameters of causal language models: shapes, logical axes, initial values."""

import math
from typing import Any

from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.params import ParamSpec

PyTree = Any


def causal_lm_specs(config: CausalLMConfig) -> PyTree:
    """Returns the specs of the parameters.

    ::

        embed/embedding                     [V, d]
        position/embedding                  [max_length, d]      with learned positions
        layers/attn_norm/{scale, bias}      [L, d]               bias with norm="layer"
        layers/attn/{q, k, v}/{kernel, bias} [L, d, H h] or [L, d, K h]
        layers/attn/qkv/{kernel, bias}      [L, d, (H + 2 K) h]  with fused_qkv, instead of q, k, v
        layers/attn/{q_norm, k_norm}/{scale, bias} [L, h]        with qk_norm
        layers/attn/out/{kernel, bias}      [L, H h, d]
        layers/attn_post_norm/{scale, bias} [L, d]               with post_norms
        layers/mlp_norm/{scale, bias}       [L, d]
        layers/mlp/{gate, up}/{kernel, bias} [L, d, f]           gate with gated_mlp
        layers/mlp/down/{kernel, bias}      [L, f, d]
        layers/mlp_post_norm/{scale, bias}  [L, d]               with post_norms
        norm/{scale, bias}                  [d]
        head/kernel                         [d, V]               without tied

    Args:
      config: The model.
    """
    d, f, v, n = config.hidden_size, config.mlp_size, config.vocab_size, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Scaled down, so that the variance of the residual stream does not grow with its 2 n additions (GPT-2).
    usual, added = 0.02, 0.02 / math.sqrt(2 * n)

    def dense(m: int, k: int, axes: tuple[str, str], bias: bool, stddev: float = usual) -> dict[str, ParamSpec]:
        spec = {"kernel": ParamSpec((n, m, k), ("layers", *axes), stddev)}
        return {**spec, "bias": ParamSpec((n, k), ("layers", axes[1]))} if bias else spec

    def norm(*lead: tuple[int, str], width: int = d) -> dict[str, ParamSpec]:
        shape, axes = (*(size for size, _ in lead), width), (*(name for _, name in lead), None)
        spec = {"scale": ParamSpec(shape, axes, value=0.0 if config.norm == "rms_offset" else 1.0)}
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
    if config.qk_norm:
        attn |= {name: norm(layer, width=config.head_dim) for name in ("q_norm", "k_norm")}
    layers = {"attn_norm": norm(layer), "attn": attn, "mlp_norm": norm(layer), "mlp": mlp}
    if config.post_norms:
        layers |= {"attn_post_norm": norm(layer), "mlp_post_norm": norm(layer)}
    specs = {
        "embed": {"embedding": ParamSpec((v, d), ("vocab", "embed"), usual)},
        "layers": layers,
        "norm": norm(),
    }
    if config.rope is None:
        specs["position"] = {"embedding": ParamSpec((config.max_length, d), (None, "embed"), usual)}
    if not config.tied:
        specs["head"] = {"kernel": ParamSpec((d, v), ("embed", "vocab"), usual)}
    return specs


def untie_causal_lm(config: CausalLMConfig, params: PyTree) -> tuple[CausalLMConfig, PyTree]:
    """Gives a tied model a head with the values of its embedding table.

    An adapter of one of them then leaves the other unchanged.

    Args:
      config: The model.
      params: Its parameters, plain arrays.

    Returns:
      The config with ``tied=False``, and the parameters with ``head/kernel [d, V]``; both unchanged if the model has a
      head already.
    """
    if not config.tied:
        return config, params
    return config.replace(tied=False), {**params, "head": {"kernel": params["embed"]["embedding"].T}}
