"""How far the domains of hidden states lie apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import losses
from subspace_jax.linalg import unit_vectors, working_dtype
from subspace_jax.losses.decoupling import VariationalProbeParams, probe_kl, probe_logits


class DomainDistances(NamedTuple):
    """Distances between the means of the domains, ``[domains, domains]`` each.

    Attributes:
      cosine: Cosines.
      l2: Euclidean distances.
    """

    cosine: jax.Array
    l2: jax.Array


def domain_distances(x: jax.Array, y: jax.Array, num_domains: int) -> DomainDistances:
    """Returns cosines and distances of the mean hidden states of domains (arXiv 2508.12803, measures).

    Args:
      x: Hidden states ``[rows, features]``, floating point.
      y: Domains ``[rows]``, integers; -1 for rows that do not count.
      num_domains: Number of domains; NaN for one without rows.

    Raises:
      ValueError: Shapes do not match.
    """
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x, y: expected [rows, features] and [rows], got {x.shape} and {y.shape}")
    dtype = working_dtype(x)
    is_of = jax.nn.one_hot(y, num_domains, dtype=dtype)
    counts = jnp.sum(is_of, axis=0)
    means = jnp.matmul(is_of.T, x.astype(dtype), precision=jax.lax.Precision.HIGHEST) / counts[:, None]
    unit = unit_vectors(means)
    cosine = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    return DomainDistances(cosine, jnp.linalg.norm(means[:, None] - means[None], axis=-1))


def domain_codelengths(params: VariationalProbeParams, x: jax.Array, y: jax.Array) -> jax.Array:
    """Splits the code length of :func:`subspace_jax.losses.decoupling.codelength` between the domains.

    Args:
      params: The probe.
      x: Hidden states ``[rows, features]``.
      y: Domains ``[rows]``, integers; -1 for rows that do not count.

    Returns:
      ``[domains]`` in nats: the cross-entropies of a domain's rows, and its share by rows of the divergence.
    """
    logits = probe_logits(params, x)
    is_of = jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype)
    counts = jnp.sum(is_of, axis=0)
    of_rows = losses.cross_entropy(logits, jnp.maximum(y, 0))
    return of_rows @ is_of + probe_kl(params) * counts / jnp.maximum(jnp.sum(counts), 1)
