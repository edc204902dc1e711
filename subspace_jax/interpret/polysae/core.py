"""The sparse autoencoder as functions of arrays: parameters, encoder, loss, scaling (arXiv 2602.01322)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax import linalg
from subspace_jax.interpret.polysae.decoder import Code, Params, decode, decoder_norms, linear_decode, matmul
from subspace_jax.interpret.polysae.retraction import qr_positive, retract_separate
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.shards import Shards, first_feature, total
from subspace_jax.interpret.polysae.sparsify import (
    SparseCode,
    auxk_code,
    batch_topk,
    jumprelu,
    next_threshold,
    step_fn,
    topk_code,
)

_WHOLE = Shards()
_FIRST_NORM, _FIRST_THRESHOLD = 0.1, 0.01


class SAEState(NamedTuple):
    """What a sparse autoencoder remembers between steps.

    Attributes:
      steps_since_fired: ``[m]`` int32.
      threshold: Threshold of BatchTopK at inference, a scalar.
    """

    steps_since_fired: jax.Array
    threshold: jax.Array


class LossParts(NamedTuple):
    """The terms of a loss, and what a step is made of.

    Attributes:
      mse: Squared error, summed over d, mean over examples.
      aux: Loss of dead features.
      inner: Nested losses, ``[levels]``.
      sparsity: Penalty on the number of features, 0 but with "jumprelu".
      l0: Mean number of features of a code.
      fired: Features that an example of the batch fires, ``[m]`` bool.
      threshold: The next threshold, a scalar.
      codes: The codes, before any division by decoder norms.
      recon: Reconstructions, ``[B, d]``.
    """

    mse: jax.Array
    aux: jax.Array
    inner: jax.Array
    sparsity: jax.Array
    l0: jax.Array
    fired: jax.Array
    threshold: jax.Array
    codes: Code
    recon: jax.Array


def init_params(key: jax.Array, config: PolySAEConfig) -> dict[str, jax.Array]:
    """Draws parameters, float32.

    ``W_enc`` is the transpose of a dictionary with rows of norm 0.1; U is Haar; C1 to C3 are uniform with a bound of
    ``sqrt(6 / R)``; lambda2 and lambda3 begin at -0.5 and 0.5.
    """
    keys = jax.random.split(key, 7)
    d, m = config.d_in, config.d_sae
    rows = jax.random.uniform(keys[0], (m, d), minval=-1.0)
    rows = _FIRST_NORM * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    params = {"W_enc": rows.T, "b_enc": jnp.zeros(m), "b_dec": jnp.zeros(d)}
    if config.has_dictionary:
        params["W_dec"] = jnp.copy(rows)
    if config.sparsifier == "jumprelu":
        params["log_theta"] = jnp.full(m, math.log(_FIRST_THRESHOLD))
    if config.decoder == "linear":
        return params
    shared = config.decoder == "shared"
    for j, rank in enumerate(config.ranks[: config.order], start=1):
        bound = math.sqrt(6 / rank)
        params[f"C{j}"] = jax.random.uniform(keys[j], (d, rank), minval=-bound, maxval=bound)
        if shared and j == 1:
            params["U"] = linalg.random_orthonormal(keys[4], m, rank)
        if not shared:
            params[f"U{j}"] = linalg.random_orthonormal(keys[3 + j], m, rank)
        if j > 1:
            params[f"lambda{j}"] = jnp.float32((-0.5, 0.5)[j - 2])
    return params


def init_state(config: PolySAEConfig) -> SAEState:
    """Returns the state before the first step."""
    return SAEState(jnp.zeros(config.d_sae, jnp.int32), jnp.zeros(()))


def pre_activations(config: PolySAEConfig, params: Params, x: jax.Array) -> jax.Array:
    """Returns ``(x - b_dec) W_enc + b_enc``, times the decoder norms with ``rescale``, ``[B, m]``."""
    check_activations(config, x)
    pre = matmul(x - params["b_dec"][None], params["W_enc"], config.dtype) + params["b_enc"][None]
    return pre * decoder_norms(config, params)[None] if config.rescale else pre


def sparse_code(
    config: PolySAEConfig, params: Params, pre: jax.Array, weights: jax.Array | None, shards: Shards = _WHOLE
) -> Code:
    """Returns the code of a training batch."""
    if config.sparsifier == "topk":
        return topk_code(pre, int(config.k), shards)
    if config.sparsifier == "jumprelu":
        return jumprelu(pre, jnp.exp(params["log_theta"]), config.bandwidth)
    return batch_topk(pre, config.k, weights=weights, shards=shards)


def inference_code(
    config: PolySAEConfig, params: Params, pre: jax.Array, threshold: jax.Array, shards: Shards = _WHOLE
) -> Code:
    """Returns the code of examples each by itself: BatchTopK is a JumpReLU with one threshold then."""
    if config.whole_batch:
        return jax.nn.relu(pre) * (pre > threshold).astype(pre.dtype)
    return sparse_code(config, params, pre, None, shards)


def reconstruct(config: PolySAEConfig, params: Params, z: Code, shards: Shards = _WHOLE) -> jax.Array:
    """Decodes a code, divided by the decoder norms with ``rescale``, ``[B, d]``."""
    return decode(config, params, _unscaled(config, params, z, shards), shards)


def poly_sae_loss(
    config: PolySAEConfig,
    params: Params,
    x: jax.Array,
    state: SAEState,
    *,
    step: jax.Array | int = 0,
    weights: jax.Array | None = None,
    shards: Shards = _WHOLE,
) -> tuple[jax.Array, LossParts]:
    """The training loss: squared error, loss of dead features, nested losses, penalty on the number of features.

    Args:
      config: The autoencoder.
      params: Its parameters; inside ``shard_map`` those of this device.
      x: Activations, ``[B, d]`` floating point.
      state: Counters and threshold before the step.
      step: Number of the step, for the warm-up of the penalty.
      weights: ``[B]``, 0 for examples that do not count, 1 for others; all count by default.
      shards: Mesh axes, inside ``shard_map``.

    Returns:
      The loss, and its parts.

    Raises:
      ValueError: ``x`` is not ``[B, d]`` or not floating point.
    """
    check_activations(config, x)
    w = jnp.ones(len(x), x.dtype) if weights is None else weights.astype(x.dtype)
    count = jnp.maximum(total(jnp.sum(w), shards.batch), 1)

    def mean(values):
        return total(jnp.sum(values * w), shards.batch) / count

    def error_of(recon):
        return mean(jnp.sum(jnp.square(recon - x), axis=1))

    pre = pre_activations(config, params, x)
    z = sparse_code(config, params, pre, weights, shards)
    recon = reconstruct(config, params, z, shards)
    mse = error_of(recon)
    dead = state.steps_since_fired > config.dead_after
    residual = jax.lax.stop_gradient(x - recon)
    aux = _dead_loss(config, params, pre, residual, dead, mean, shards)
    levels = [error_of(_nested(config, params, z, width, shards)) for width in config.nested]
    inner = jnp.stack(levels) if levels else jnp.zeros(0, mse.dtype)
    sparsity = jnp.zeros_like(mse)
    if config.sparsifier == "jumprelu":
        steps = step_fn(pre, jnp.exp(params["log_theta"]), config.bandwidth)
        grown = jnp.minimum(jnp.asarray(step, x.dtype) / max(config.l0_warmup, 1), 1) if config.l0_warmup else 1.0
        sparsity = config.l0_coefficient * grown * mean(total(jnp.sum(steps, axis=1), shards.features))
    loss = mse + config.aux_coefficient * aux + jnp.sum(inner) + sparsity
    fired, l0 = _fired(z, w, len(state.steps_since_fired), mean, shards)
    threshold = next_threshold(state.threshold, z, shards) if config.whole_batch else state.threshold
    return loss, LossParts(mse, aux, inner, sparsity, l0, fired, threshold, z, recon)


def next_state(state: SAEState, parts: LossParts) -> SAEState:
    """Returns the state after a step: counters go on, and begin at 0 for features that fired."""
    return SAEState(jnp.where(parts.fired, 0, state.steps_since_fired + 1), parts.threshold)


def retract(config: PolySAEConfig, params: Params) -> dict[str, jax.Array]:
    """Returns the parameters with orthonormal factors again, after the update of an optimizer."""
    if config.decoder == "linear":
        return dict(params)
    if config.decoder == "shared":
        return {**params, "U": qr_positive(params["U"])}
    if config.order == 3:
        return retract_separate(params)
    return {**params, **{f"U{j}": qr_positive(params[f"U{j}"]) for j in range(1, config.order + 1)}}


def fold_scale(params: Params, scale: float, center: jax.Array | float = 0.0) -> dict[str, jax.Array]:
    """Returns parameters for activations ``x`` as they are, out of those trained on ``scale x - center``.

    Codes stay the same, and reconstructions are those of ``x``: exact without ``rescale``.
    """
    params = {**params, "b_dec": params["b_dec"] + center}
    factors = {"W_enc": scale, **dict.fromkeys(("b_dec", "C1", "C2", "C3", "W_dec"), 1 / scale)}
    return {name: x * factors[name] if name in factors else x for name, x in params.items()}


def poly_sae_optimizer(learning_rate: optax.ScalarOrSchedule = 3e-4) -> optax.GradientTransformation:
    """The optimizer of the paper: the whole gradient times ``min(1, 1 / (norm + 1e-6))``, then Adam."""

    def clip(updates, params=None):
        del params
        factor = jnp.minimum(1, 1 / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.chain(optax.stateless(clip), optax.adam(learning_rate))


def check_activations(config: PolySAEConfig, x: jax.Array) -> None:
    """Raises a ValueError unless ``x`` holds activations of the autoencoder's width."""
    if x.ndim != 2 or x.shape[1] != config.d_in:
        raise ValueError(f"x: expected activations [B, {config.d_in}], got shape {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected floating-point activations, got {x.dtype}")


def _unscaled(config: PolySAEConfig, params: Params, z: Code, shards: Shards) -> Code:
    if not config.rescale:
        return z
    norms = decoder_norms(config, params)
    if not isinstance(z, SparseCode):
        return z / norms[None]
    if shards.features:
        norms = jax.lax.all_gather(norms, shards.features, tiled=True)
    return z._replace(values=z.values / norms[z.indices])


def _dead_loss(config, params, pre, residual, dead, mean, shards):
    """What dead features can explain of the error; computed only where there are any."""
    features = pre.shape[1] * (jax.lax.axis_size(shards.features) if shards.features else 1)
    most = min(max(config.d_in // 2, 1), features)
    count = total(jnp.sum(dead, dtype=jnp.int32), shards.features)

    def some(params, pre):
        code = auxk_code(pre, dead, most, shards)
        squares = jnp.sum(jnp.square(reconstruct(config, params, code, shards) - residual), axis=1)
        return jnp.minimum(count.astype(pre.dtype) / max(config.d_in // 2, 1), 1) * mean(squares)

    return jax.lax.cond(count > 0, some, lambda params, pre: jnp.zeros((), pre.dtype), dict(params), pre)


def _nested(config, params, z, width, shards):
    """Decodes the first features of a code."""
    start = first_feature(z.shape[1], shards.features)
    first = jnp.where((start + jnp.arange(z.shape[1]) < width)[None], z, 0)
    if config.inner == "linear" and config.decoder != "linear":
        return linear_decode(params, first, dtype=config.dtype, shards=shards)
    return reconstruct(config, params, first, shards)


def _fired(z, w, features, mean, shards):
    """Features that an example fires, and the mean number of features of a code."""
    counted = w[:, None] > 0
    if isinstance(z, SparseCode):
        l0 = mean(jnp.sum(z.values > 0, axis=1).astype(w.dtype))
        start = first_feature(features, shards.features)
        local = jnp.where((z.values > 0) & counted, z.indices - start, features)
        # Negative indices are those of other devices; as all that is out of range they are dropped.
        local = jnp.where(local < 0, features, local)
        fired = jnp.zeros(features, bool).at[local.reshape(-1)].set(True, mode="drop")
    else:
        l0 = mean(total(jnp.sum(z > 0, axis=1).astype(w.dtype), shards.features))
        fired = jnp.any((z > 0) & counted, axis=0)
    return total(fired.astype(jnp.int32), shards.batch) > 0, l0
