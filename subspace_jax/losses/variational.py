"""Terms of variational autoencoders: samples of a Gaussian code, its divergence from the prior, decorrelation."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import gram, working_dtype

_LOGVAR_LIMIT = 20.0
_EPS = 1e-8


def gaussian_kl(mu: jax.Array, logvar: jax.Array) -> jax.Array:
    """Divergence of diagonal Gaussians from the standard normal: the mean over the batch of the sum over dimensions.

    ``-1/2 sum_j (1 + logvar_j - mu_j^2 - exp(logvar_j))`` (Kingma and Welling, arXiv 1312.6114, appendix B), with
    ``logvar`` clipped to [-20, 20].

    Args:
      mu: Means ``[batch, dims]``, floating point; without dimensions the divergence is 0.
      logvar: Logarithms of the variances ``[batch, dims]``.

    Returns:
      A scalar in nats, float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    mu, logvar = _gaussian(mu, logvar)
    return -0.5 * jnp.mean(jnp.sum(1 + logvar - jnp.square(mu) - jnp.exp(logvar), axis=1))


def reparameterize(key: jax.Array, mu: jax.Array, logvar: jax.Array) -> jax.Array:
    """Samples diagonal Gaussians, differentiably: ``mu + exp(logvar / 2) * noise`` (arXiv 1312.6114, section 2.4).

    Args:
      key: Random key of the noise.
      mu: See :func:`gaussian_kl`.
      logvar: See :func:`gaussian_kl`; clipped likewise.

    Returns:
      ``[batch, dims]``, float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    mu, logvar = _gaussian(mu, logvar)
    return mu + jnp.exp(logvar / 2) * jax.random.normal(key, mu.shape, mu.dtype)


def cross_correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Correlations of the columns of two matrices, ``cov / (std_a std_b + 1e-8)`` with moments over ``n - 1``.

    Args:
      a: ``[batch, p]``, floating point, with at least two examples.
      b: ``[batch, q]``.

    Returns:
      ``[p, q]``, float32 or wider.

    Raises:
      ValueError: Shapes do not match, or there is one example.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[0] < 2:
        raise ValueError(f"a, b: expected [batch, p] and [batch, q] of at least two examples, got {a.shape}, {b.shape}")
    wide = working_dtype(a, b)
    count = a.shape[0] - 1
    a, b = (x.astype(wide) - jnp.mean(x.astype(wide), axis=0, keepdims=True) for x in (a, b))
    # The root of a constant column has no gradient: it is taken of 1 instead, and the product is 0 by its covariance.
    squares = [jnp.sum(jnp.square(x), axis=0) / count for x in (a, b)]
    spread = [jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1)), 0) for s in squares]
    return gram(a, b) / count / (spread[0][:, None] * spread[1][None, :] + _EPS)


def cross_correlation_penalty(a: jax.Array, b: jax.Array) -> jax.Array:
    """Frobenius norm of the correlations between two codes, at most 1 (arXiv 2601.21688, the authors' code).

    Above a norm of 1 the gradient is zero.

    Args:
      a: See :func:`cross_correlation`.
      b: See :func:`cross_correlation`.

    Returns:
      A scalar in [0, 1], float32 or wider, with gradient 0 where all correlations are 0.

    Raises:
      ValueError: Shapes do not match, or there is one example.
    """
    square = jnp.sum(jnp.square(cross_correlation(a, b)))
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return jnp.minimum(norm, 1)


def _gaussian(mu: jax.Array, logvar: jax.Array) -> tuple[jax.Array, jax.Array]:
    if mu.ndim != 2 or mu.shape != logvar.shape:
        raise ValueError(f"mu, logvar: expected [batch, dims] alike, got {mu.shape}, {logvar.shape}")
    wide = working_dtype(mu, logvar)
    return mu.astype(wide), jnp.clip(logvar.astype(wide), -_LOGVAR_LIMIT, _LOGVAR_LIMIT)
