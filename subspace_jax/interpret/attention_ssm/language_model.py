"""The attention layers of a causal language model as heads with operators, and how far their gradients travel."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import nn
from subspace_jax.interpret.attention_ssm.gradients import gradient_decay
from subspace_jax.interpret.attention_ssm.rank import Factors, factored_interaction_rank
from subspace_jax.interpret.attention_ssm.ssm import einsum
from subspace_jax.nn.models.causal_lm.model import apply_norm, attention_heads, layer_inputs, score_scale
from subspace_jax.train.progress import progress_bar

PyTree = Any
# Of a largest singular value, from a random start; the error falls geometrically, and no less than as 1 / steps.
_POWER_STEPS = 32


class LayerMeasure(NamedTuple):
    """What the operators of an attention layer are.

    Attributes:
      rank: Interaction rank of all pairs of tokens in all rows, at most the number of heads.
      effective_rank: ``exp`` of the entropy of the squared singular values' shares.
      singular_values: ``[heads]``, descending.
      half_error: Relative error of the best half of the heads, rounded up, over all coefficients.
      mean_distance: Mean distance of attention, in tokens.
      first_token: Mean weight of the first token, of all later ones.
      profile: Spectral norms of the derivative of the last output by the layer's inputs, by distance, mean over rows,
        ``[length]``.
      half_distance: See :class:`GradientDecay`.
      log_slope: See :class:`GradientDecay`.
    """

    rank: int
    effective_rank: float
    singular_values: np.ndarray
    half_error: float
    mean_distance: float
    first_token: float
    profile: np.ndarray
    half_distance: int
    log_slope: float


class _Layer(NamedTuple):
    """An attention layer with its normalized input, ``[rows, n, d]``, and its mask, ``[n, n]``."""

    params: PyTree
    x: jax.Array
    tables: Any
    mask: jax.Array
    index: jax.Array


def layer_factors(config: nn.CausalLMConfig, params: PyTree, tokens: jax.Array, layer: int) -> Factors:
    """Returns the attention of a layer in factored form, ``y_i = sum_h sum_j coef[h, i, j] V_h x_j``.

    ``x`` are the layer's normalized inputs, ``coef`` the softmax weights of rotated queries and keys, and
    ``V_h = W_O^h W_V^h`` with the value kernel that a query head shares with others.  Biases of values and output add
    a constant, which is no part of an operator.

    Args:
      config: The model.
      params: Its parameters, layers stacked; kernels may be structured.
      tokens: ``[rows, n]`` integers, without padding.
      layer: Index of the layer, from 0.

    Returns:
      Coefficients ``[heads, rows, n, n]`` and operators ``[heads, d, d]``, float32.

    Raises:
      ValueError: ``tokens`` or ``layer`` can't serve.
    """
    if not 0 <= layer < config.num_layers:
        raise ValueError(f"layer: expected 0 to {config.num_layers - 1}, got {layer}")
    inputs = _inputs_of(config, params, tokens, _hidden(config, params, tokens), layer)
    with jax.default_matmul_precision("highest"):
        return _factors_of(config, inputs)


def measure_layers(
    config: nn.CausalLMConfig, params: PyTree, tokens: jax.Array, *, progress: bool = False
) -> list[LayerMeasure]:
    """Measures the attention layers of a model one after another; the operators of one are in memory at a time.

    Arguments: see :func:`layer_factors`; ``n`` is at least 4.

    Raises:
      ValueError: ``tokens`` can't serve, or the model gives NaN.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 4:
        raise ValueError(f"tokens: expected [rows, n] of at least 4 tokens, got shape {list(tokens.shape)}")
    hidden = _hidden(config, params, tokens)
    found = []
    with progress_bar(config.num_layers, 0, show=progress) as bar:
        for layer in range(config.num_layers):
            inputs = _inputs_of(config, params, tokens, hidden, layer)
            with jax.default_matmul_precision("highest"):
                own = jax.device_get(_measure(config, inputs))
            if not (np.isfinite(own.singular_values).all() and np.isfinite(own.profile).all()):
                raise ValueError(f"model: the attention of layer {layer} gives NaN or infinity")
            numbers = {name: x.item() if np.ndim(x) == 0 else x for name, x in own._asdict().items()}
            found.append(LayerMeasure(**numbers))
            bar.update()
    return found


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: nn.CausalLMConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    options = {"capture_hidden": True, "with_logits": False, "dtype": jnp.float32}
    return nn.causal_lm_apply(config, params, tokens, **options).hidden


def _inputs_of(config: nn.CausalLMConfig, params: PyTree, tokens: jax.Array, hidden: jax.Array, layer: int) -> _Layer:
    others = jax.tree.map(lambda x: x[layer], layer_inputs(config))
    own = jax.tree.map(lambda x: x[layer], nn.stack_layers(params)["layers"])
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rope = config.local_rope if config.local_rope is not None and others["local"] else config.rope
    tables = None if rope is None else nn.rope_tables(rope, config.head_dim, positions[None])
    window = others["window"] if config.windows_differ else config.window
    mask = nn.causal_mask(positions, positions[None], positions[None], window=window)[0, 0]
    return _Layer(own["attn"], apply_norm(config, own["attn_norm"], hidden[layer]), tables, mask, others["index"])


@functools.partial(jax.jit, static_argnums=0)
def _factors_of(config: nn.CausalLMConfig, layer: _Layer) -> Factors:
    query, key, _ = attention_heads(config, layer.params, layer.x, layer.tables)
    groups = config.num_heads // config.num_kv_heads
    raw = _scale(config, layer.index) * einsum("bihk,bjhk->hbij", query, jnp.repeat(key, groups, axis=2))
    coef = jax.nn.softmax(jnp.where(layer.mask[None, None], _capped(config, raw)[0], -jnp.inf), axis=-1)
    # The values are affine in x, so that the identity and 0 give their kernel, structured or not.
    d, width = layer.x.shape[-1], config.num_heads * config.head_dim
    of_eye, of_zero = (
        attention_heads(config, layer.params, x[None], None)[2][0] for x in (jnp.eye(d), jnp.zeros((1, d)))
    )
    into = jnp.repeat(of_eye - jnp.broadcast_to(of_zero, of_eye.shape), groups, axis=1)
    out = nn.linear(jnp.eye(width), layer.params["out"]["kernel"])
    return Factors(coef, einsum("dhk,hkp->hpd", into, out.reshape(config.num_heads, config.head_dim, -1)))


@functools.partial(jax.jit, static_argnums=0)
def _measure(config: nn.CausalLMConfig, layer: _Layer) -> LayerMeasure:
    factors = _factors_of(config, layer)
    report = factored_interaction_rank(factors)
    energy = jnp.square(report.singular_values)
    distance = layer.mask.shape[0]
    back = jnp.asarray(np.subtract.outer(np.arange(distance), np.arange(distance)), jnp.float32)
    profile = jnp.mean(jax.vmap(lambda x: _last_gradients(config, layer._replace(x=x)))(layer.x), axis=0)
    decay = gradient_decay(profile)
    return LayerMeasure(
        rank=report.k,
        effective_rank=report.effective_rank,
        singular_values=report.singular_values,
        half_error=jnp.sqrt(jnp.sum(energy[-(-config.num_heads // 2) :]) / jnp.sum(energy)),
        mean_distance=jnp.mean(einsum("hbij,ij->hbi", factors.coef, back)),
        first_token=jnp.mean(factors.coef[:, :, 1:, 0]),
        profile=profile,
        half_distance=decay.half_distance,
        log_slope=decay.log_slope,
    )


def _last_gradients(config: nn.CausalLMConfig, layer: _Layer) -> jax.Array:
    """Returns the spectral norms of the derivatives of the last output by each input of a row, by distance, ``[n]``.

    The operator at each token is applied to a vector of its own: queries, keys and values depend on their own token
    alone, and the rest is :func:`attention_jacobian`.  So a step of power iteration for all tokens costs what the
    projections cost.
    """
    groups = config.num_heads // config.num_kv_heads

    def heads(x):
        query, key, value = (y[0] for y in attention_heads(config, layer.params, x[None], layer.tables))
        return query, jnp.repeat(key, groups, axis=1), jnp.repeat(value, groups, axis=1)

    (query, key, value), push = jax.linearize(heads, layer.x)
    scale = _scale(config, layer.index)
    scores, slope = _capped(config, scale * einsum("hk,nhk->nh", query[-1], key))
    weights = jax.nn.softmax(jnp.where(layer.mask[-1][:, None], scores, -jnp.inf), axis=0)
    spread = value - einsum("nh,nhk->hk", weights, value)[None]
    gain = scale * slope

    def tangent(t):
        d_query, d_key, d_value = push(t)
        by_key = gain * einsum("hk,nhk->nh", query[-1], d_key)
        mixed = weights[..., None] * (d_value + spread * by_key[..., None])
        by_query = gain * weights * einsum("hk,nhk->nh", d_query[-1], key)
        mixed = mixed.at[-1].add(einsum("nh,nhk->hk", by_query, spread))
        return nn.linear(mixed.reshape(len(t), -1), layer.params["out"]["kernel"])

    pull = jax.linear_transpose(tangent, layer.x)

    def unit(t):
        norm = jnp.linalg.norm(t, axis=-1, keepdims=True)
        return t / jnp.where(norm > 0, norm, 1)

    start = unit(jax.random.normal(jax.random.key(0), layer.x.shape))
    last = jax.lax.fori_loop(0, _POWER_STEPS, lambda _, t: unit(pull(tangent(t))[0]), start)
    return jnp.flip(jnp.linalg.norm(tangent(last), axis=-1))


def _scale(config: nn.CausalLMConfig, index: jax.Array) -> jax.Array:
    """Returns the factor of a layer's scores."""
    scale = score_scale(config)
    scale = jnp.float32(1 / math.sqrt(config.head_dim) if scale is None else scale)
    return scale / (index + 1).astype(jnp.float32) if config.scale_by_layer else scale


def _capped(config: nn.CausalLMConfig, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns scores with the model's bound, and the slope of that bound."""
    cap = config.score_softcap
    if cap is None:
        return scores, jnp.ones_like(scores)
    bent = jnp.tanh(scores / cap)
    return cap * bent, 1 - jnp.square(bent)
