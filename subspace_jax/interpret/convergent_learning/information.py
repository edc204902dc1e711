"""Mutual information of units of two networks, by histograms (arXiv 1511.07543, section 3.3)."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype

# Activations below this are those of a rectifier that is off.
_ZERO = 1e-6


def mutual_information_matrix(x: jax.Array, y: jax.Array, bins: int = 10, *, bias: str = "miller_madow") -> jax.Array:
    """Mutual information of each unit with each unit of another network.

    Made for rectified activations: the first bin of a unit holds its zeros, the others like numbers of the rest.
    Takes ``n p q bins^2`` operations and ``n q bins`` numbers of memory.

    Args:
      x: Activations ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.
      bins: Bins of a unit.
      bias: What is subtracted: ``"miller_madow"``, the bias ``(bins - 1)^2 / (2 n)`` of the plug-in estimate in nats;
        ``"reference"``, ``bins^2 / (2 n ln 2)``, which is in bits, as in the paper's code; or ``"none"``.

    Returns:
      ``[p, q]`` in nats, float32 or wider; below 0 where the subtracted bias is larger than the estimate.

    Raises:
      ValueError: The numbers of examples differ, there are fewer than two bins, or ``bias`` is unknown.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or 0 in x.shape + y.shape:
        raise ValueError(f"x, y: expected [n, p] and [n, q] of the same examples, got {x.shape} and {y.shape}")
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    n = x.shape[0]
    subtracted = {"miller_madow": (bins - 1) ** 2 / (2 * n), "reference": bins**2 / (2 * n * 0.6931471805599453)}
    if bias not in (*subtracted, "none"):
        raise ValueError(f"bias: expected miller_madow, reference or none, got {bias!r}")
    x, y = (a.astype(working_dtype(x, y)) for a in (x, y))
    of_x, of_y = (jax.vmap(lambda v: one_hot_bins(v, unit_edges(v, bins)))(a.T) for a in (x, y))

    def with_all(one):
        # Sums of zeros and ones are exact.
        joint = jnp.einsum("nb,qnc->qbc", one, of_y, precision=jax.lax.Precision.HIGHEST) / n
        return jnp.sum(_entropy_terms(joint), axis=(1, 2))

    joint = jax.lax.map(with_all, of_x)
    own_x, own_y = (jnp.sum(_entropy_terms(jnp.mean(a, axis=1)), axis=1) for a in (of_x, of_y))
    return joint - own_x[:, None] - own_y[None] - subtracted.get(bias, 0.0)


def unit_edges(v: jax.Array, bins: int) -> jax.Array:
    """The edges of a unit's bins: its minimum, and percentiles from the share of its zeros to 100.

    Args:
      v: Activations ``[n]``.
      bins: Number of bins.

    Returns:
      ``[bins + 1]``, ascending; those of a unit that is always off coincide.
    """
    zeros = jnp.mean((v < _ZERO).astype(v.dtype))
    # A little more than their share, so that all zeros are below the edge.
    start = jnp.minimum(100.1 * zeros, 100.0)
    percent = jnp.concatenate([jnp.zeros(1, v.dtype), jnp.linspace(start, 100.0, bins, dtype=v.dtype)])
    return jnp.percentile(v, percent).at[0].add(-0.01)


def one_hot_bins(v: jax.Array, edges: jax.Array) -> jax.Array:
    """Returns the bin of each activation as ``[n, bins]`` of 0 and 1; the last bin has its upper edge."""
    bins = edges.shape[0] - 1
    index = jnp.clip(jnp.searchsorted(edges, v, side="right") - 1, 0, bins - 1)
    return jax.nn.one_hot(index, bins, dtype=v.dtype)


def _entropy_terms(p: jax.Array) -> jax.Array:
    return jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)
