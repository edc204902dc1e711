"""A variational linear probe: which domain a hidden state is of, and in how many nats it can be told.

Minimum description length probing (Voita and Titov, arXiv 2003.12298) with the group Normal-Jeffreys prior over input
dimensions (Louizos et al., arXiv 1705.08665), as Subspace Chronicles uses it (Mueller-Eberstein et al., arXiv
2310.16484).  Matrices are ``[classes, features]``, as in these papers' code.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.linalg import working_dtype
from subspace_jax.losses.classification import cross_entropy

# The approximation of the divergence from the log-uniform prior of Molchanov et al. (arXiv 1701.05369, equation 14).
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
LARGEST_VARIANCE = 0.04


class VariationalProbeParams(NamedTuple):
    """Means and log-variances of a probe's Gaussians, float32.

    Attributes:
      z_mu: Scale of each input feature, ``[features]``.
      z_logvar: ``[features]``.
      weight_mu: ``[classes, features]``.
      weight_logvar: ``[classes, features]``.
      bias_mu: ``[classes]``.
      bias_logvar: ``[classes]``.
    """

    z_mu: jax.Array
    z_logvar: jax.Array
    weight_mu: jax.Array
    weight_logvar: jax.Array
    bias_mu: jax.Array
    bias_logvar: jax.Array


class ProbeState(NamedTuple):
    """A probe in training: its parameters and the state of their optimizer."""

    params: VariationalProbeParams
    opt_state: optax.OptState


def init_variational_probe(key: jax.Array, num_features: int, num_classes: int) -> VariationalProbeParams:
    """Returns fresh parameters, float32.

    Args:
      key: Random key.
      num_features: Length of a hidden state.
      num_classes: Number of domains.

    Raises:
      ValueError: There are fewer than two classes, or no feature.
    """
    if num_classes < 2 or num_features < 1:
        raise ValueError(
            f"num_features, num_classes: expected at least 1 and 2, got {num_features} features, {num_classes} classes"
        )
    inputs, outputs = (num_features,), (num_classes,)
    shapes = (inputs, inputs, outputs + inputs, outputs + inputs, outputs, outputs)
    keys = jax.random.split(key, len(shapes))
    noise = VariationalProbeParams(*(jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True)))
    return VariationalProbeParams(
        z_mu=1 + 0.01 * noise.z_mu,
        z_logvar=-9 + 0.01 * noise.z_logvar,
        weight_mu=noise.weight_mu / math.sqrt(num_features),
        weight_logvar=-9 + 0.01 * noise.weight_logvar,
        bias_mu=jnp.zeros(num_classes, jnp.float32),
        bias_logvar=-9 + 0.01 * noise.bias_logvar,
    )


def probe_logits(params: VariationalProbeParams, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Maps hidden states to logits of the domains.

    Args:
      params: The probe.
      x: ``[rows, features]``, floating point.
      key: Key of the noise of training, drawn for each row; None, as in evaluation, takes the posterior's mean.

    Returns:
      ``[rows, classes]``, float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    if x.ndim != 2 or x.shape[1] != params.z_mu.shape[0]:
        raise ValueError(f"x: expected [rows, {params.z_mu.shape[0]}], got {x.shape}")
    x = x.astype(working_dtype(x, params.z_mu))
    if key is None:
        return _product(x, posterior(params)[0]) + params.bias_mu[None]
    keys = jax.random.split(key)
    shapes = x.shape, (x.shape[0], params.bias_mu.shape[0])
    return noisy_logits(params, x, *(jax.random.normal(k, s, x.dtype) for k, s in zip(keys, shapes, strict=True)))


def noisy_logits(params: VariationalProbeParams, x: jax.Array, of_inputs: jax.Array, of_logits: jax.Array) -> jax.Array:
    """Returns logits ``[rows, classes]`` with given standard normal noise: the local reparametrisation.

    Args:
      params: The probe.
      x: ``[rows, features]``.
      of_inputs: Noise of the input scales, ``[rows, features]``.
      of_logits: Noise of the logits, ``[rows, classes]``.
    """
    scaled = x * (params.z_mu[None] + of_inputs * jnp.exp(params.z_logvar / 2)[None])
    mean = _product(scaled, params.weight_mu) + params.bias_mu[None]
    variance = _product(jnp.square(scaled), jnp.exp(params.weight_logvar)) + jnp.exp(params.bias_logvar)[None]
    return mean + of_logits * jnp.sqrt(variance)


def probe_kl(params: VariationalProbeParams) -> jax.Array:
    """Divergence of the posterior from the prior in nats, a scalar."""
    log_alpha = params.z_logvar - jnp.log(jnp.square(params.z_mu) + 1e-8)
    of_scales = _K1 * jax.nn.sigmoid(_K2 + _K3 * log_alpha) - 0.5 * jax.nn.softplus(-log_alpha) - _K1
    weights = _normal_kl(params.weight_mu, params.weight_logvar)
    return weights + _normal_kl(params.bias_mu, params.bias_logvar) - jnp.sum(of_scales)


def probe_loss(
    params: VariationalProbeParams, x: jax.Array, y: jax.Array, key: jax.Array, total: int | jax.Array
) -> jax.Array:
    """Code length of a batch in nats: the sum of its cross-entropies, and its share of the divergence.

    Args:
      params: The probe.
      x: ``[rows, features]``.
      y: Domains ``[rows]``, integers; -1 for rows that do not count.
      key: Key of the noise.
      total: Number of targets that the batch is a part of.

    Returns:
      A scalar.
    """
    return batch_codelength(params, probe_logits(params, x, key), y, total)


def batch_codelength(
    params: VariationalProbeParams, logits: jax.Array, y: jax.Array, total: int | jax.Array
) -> jax.Array:
    """Returns the loss of :func:`probe_loss` for given logits ``[rows, classes]``."""
    counts = y >= 0
    entropies = cross_entropy(logits, jnp.maximum(y, 0))
    share = jnp.sum(counts).astype(logits.dtype) / jnp.asarray(total).astype(logits.dtype)
    return jnp.sum(jnp.where(counts, entropies, 0)) + probe_kl(params) * share


def clip_variances(params: VariationalProbeParams, largest: float = LARGEST_VARIANCE) -> VariationalProbeParams:
    """Returns the probe with variances of weights and biases of at most ``largest``.

    Raises:
      ValueError: ``largest`` is not positive.
    """
    if not largest > 0:
        raise ValueError(f"largest: expected a positive variance, got {largest}")
    weight, bias = (jnp.minimum(x, math.log(largest)) for x in (params.weight_logvar, params.bias_logvar))
    return params._replace(weight_logvar=weight, bias_logvar=bias)


def posterior(params: VariationalProbeParams) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of the weights that act on the inputs, ``[classes, features]`` each."""
    z, z_var, w_var = params.z_mu[None], jnp.exp(params.z_logvar)[None], jnp.exp(params.weight_logvar)
    mean = params.weight_mu * z
    return mean, jnp.square(z) * w_var + z_var * jnp.square(params.weight_mu) + z_var * w_var


def codelength(params: VariationalProbeParams, x: jax.Array, y: jax.Array) -> jax.Array:
    """Code length of domains given hidden states in nats; a uniform code takes ``rows ln(classes)``.

    Args:
      params: The probe.
      x: ``[rows, features]``.
      y: Domains ``[rows]``, integers; -1 for rows that do not count.

    Returns:
      A scalar; divided by ``ln 2`` in bits.
    """
    return batch_codelength(params, probe_logits(params, x), y, jnp.maximum(jnp.sum(y >= 0), 1))


def fit_probe(
    key: jax.Array,
    state: ProbeState | VariationalProbeParams,
    x: jax.Array,
    y: jax.Array,
    steps: int,
    opt: optax.GradientTransformation,
    *,
    batch_size: int = 256,
) -> ProbeState:
    """Trains a probe, from where it stands.

    Args:
      key: Random key of batches and noise.
      state: A probe, or one in training with the state of ``opt``.
      x: ``[rows, features]``.
      y: Domains ``[rows]``, integers; -1 for rows that do not count.
      steps: Steps of the optimizer.
      opt: The optimizer, such as ``optax.adam(1e-2)``.
      batch_size: Rows of a batch, drawn with replacement; all of them where there are not more.

    Returns:
      The state after the last step.  Variances are clipped at 0.04 after each.

    Raises:
      ValueError: Shapes do not match; or, unless traced: a row is not finite, a domain is not in 0 to classes - 1, or
        all rows are of one.
    """
    check_domains(x, y, (state.params if isinstance(state, ProbeState) else state).bias_mu.shape[0])
    if not isinstance(state, ProbeState):
        state = ProbeState(state, opt.init(state))
    total = jnp.maximum(jnp.sum(y >= 0), 1)

    def step(state, key):
        pick, noise = jax.random.split(key)
        rows = slice(None) if len(y) <= batch_size else jax.random.randint(pick, (batch_size,), 0, len(y))
        grads = jax.grad(probe_loss)(state.params, x[rows], y[rows], noise, total)
        updates, opt_state = opt.update(grads, state.opt_state, state.params)
        return ProbeState(clip_variances(optax.apply_updates(state.params, updates)), opt_state), None

    return jax.lax.scan(step, state, jax.random.split(key, steps))[0]


def check_domains(x: jax.Array, y: jax.Array, num_classes: int) -> None:
    """Raises a ValueError unless rows are finite and of at least two domains; of traced arrays only shapes are seen."""
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x, y: expected [rows, features] and [rows], got {x.shape} and {y.shape}")
    if isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer):
        return
    if not bool(jnp.all(jnp.isfinite(x))):
        raise ValueError("x: expected finite hidden states, got NaN or infinity")
    seen = np.unique(np.asarray(y))
    if len(seen) and (seen[0] < -1 or seen[-1] >= num_classes):
        raise ValueError(f"y: expected domains in 0 to {num_classes - 1}, or -1, got {seen[0]} to {seen[-1]}")
    if len(seen[seen >= 0]) < 2:
        raise ValueError(f"y: expected rows of at least two domains, got only {seen[seen >= 0].tolist()}")


def _normal_kl(mu: jax.Array, logvar: jax.Array) -> jax.Array:
    return jnp.sum(-logvar / 2 + (jnp.exp(logvar) + jnp.square(mu)) / 2 - 0.5)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x, weight.T, precision=jax.lax.Precision.HIGHEST)
