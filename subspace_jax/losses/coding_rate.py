"""Coding rates, and the losses of maximal coding rate reduction.

Coding rates are those of Ma, Derksen, Hong and Wright 2007 in the form of MCR^2 (arXiv 2006.08558): the logarithm of
the volume that examples fill, in nats, at a precision ``epsilon``.  ``eps_sq`` is ``epsilon^2``.
"""

import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg

MASSES = ("actual", "unit")
_EMPTY = 1e-8  # added to masses, as in CPP: a cluster without examples has no rate
_UNIT = 1e-3
_NUMBERS_AT_A_TIME = 2**24


def coding_rate(z: jax.Array, eps_sq: float, *, check: bool = True) -> jax.Array:
    """Coding rate of all examples, ``logdet(I + d / (n eps_sq) Z^T Z)``, 0 where all are zero.

    Args:
      z: ``[n, d]``, unit rows, floating point; the Gram matrix is float32 or wider.
      eps_sq: Squared precision, above 0.
      check: Whether rows of another length than 1, by more than 1e-3, are refused where their values are known.

    Returns:
      A scalar.

    Raises:
      ValueError: ``z`` is no matrix or not finite, ``eps_sq`` is not above 0, or a row is not of unit length.
    """
    z = _features("z", z, eps_sq, check)
    n, d = z.shape
    z = z if n >= d else z.T
    return _log_det(linalg.gram(z, z) * (d / (n * eps_sq)))


def coding_rate_membership(
    z: jax.Array,
    m: jax.Array,
    eps_sq: float,
    mass: str = "actual",
    *,
    block_size: int | None = None,
    check: bool = True,
) -> jax.Array:
    """Coding rate of examples in clusters: ``sum_j (m_j / n) logdet(I + d / (m_j eps_sq) Z^T Diag(M_j) Z)``.

    Of all memberships of which a row sums to 1, it is largest where the clusters are alike, and is then that of
    :func:`coding_rate`.  With the rows (or columns) of a doubly stochastic matrix as clusters it is equation (4) of
    arXiv 2301.01805.

    A backward pass keeps ``z`` and ``m`` alone, and forms the ``[d, d]`` matrix of each cluster again, a block of
    clusters at a time: ``3 clusters n d^2`` multiplications forward and backward together, instead of ``clusters d^2``
    numbers in memory.  Clusters may be sharded; each device then has its own of a block.

    Args:
      z: ``[n, d]``, unit rows, floating point.
      m: ``[n, clusters]``, the share of each example in each cluster, not negative.
      eps_sq: Squared precision, above 0.
      mass: The mass of a cluster: "actual" is the sum of its column, "unit" is 1.
      block_size: Clusters at a time; by default so many that the block takes 64 MB.
      check: See :func:`coding_rate`.

    Returns:
      A scalar, float32 or wider.  It has derivatives in reverse mode only.

    Raises:
      ValueError: ``z`` is as :func:`coding_rate` refuses it; or ``m`` does not fit it, or has (where its values are
        known) a negative entry or a NaN, or with "unit" masses a column of zeros; or ``mass`` is unknown.
    """
    z = _features("z", z, eps_sq, check)
    n, d = z.shape
    if m.ndim != 2 or m.shape[0] != n or not m.shape[1]:
        raise ValueError(f"m: expected memberships [{n}, clusters] of the rows of z, got shape {m.shape}")
    if mass not in MASSES:
        raise ValueError(f"mass: expected one of {MASSES}, got {mass!r}")
    _check_membership(m, mass)
    m = m.astype(z.dtype)
    block_size = max(1, _NUMBERS_AT_A_TIME // (d * max(n, d))) if block_size is None else block_size
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    if mass == "unit":
        return jnp.sum(_log_dets(z, m * (d / eps_sq), block_size)) / n
    masses = jnp.sum(m, axis=0) + _EMPTY
    return jnp.sum(masses * _log_dets(z, m * (d / eps_sq / masses)[None], block_size)) / n


def mcr2_loss(
    z: jax.Array, m: jax.Array, eps_sq: float, gamma: float = 1.0, mass: str = "actual", *, check: bool = True
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Coding rate reduction as a loss: ``-R / 2 + gamma R_c / 2``, from few dimensions per cluster to many in all.

    Args:
      z: ``[n, d]``, unit rows.
      m: ``[n, clusters]``, one-hot labels, or a membership such as a doubly stochastic ``[n, n]``.
      eps_sq: Squared precision, above 0.
      gamma: Weight of the rate in clusters.
      mass: See :func:`coding_rate_membership`.
      check: See :func:`coding_rate`.

    Returns:
      The loss, and ``(expand, compress)``: half of the rate of all examples, and half of that in clusters.

    Raises:
      ValueError: See :func:`coding_rate_membership`.
    """
    expand = coding_rate(z, eps_sq, check=check) / 2
    compress = coding_rate_membership(z, m, eps_sq, mass, check=False) / 2
    return gamma * compress - expand, (expand, compress)


def tcr_loss(
    z1: jax.Array,
    z2: jax.Array,
    eps_sq: float,
    weight: float,
    *,
    normalize_mean: bool = False,
    check: bool = True,
) -> jax.Array:
    """Total coding rate of two views: ``-R((Z + Z') / 2) / 2 - weight mean_i <z_i, z'_i>`` (NMCE, arXiv 2201.10000).

    Args:
      z1: ``[n, d]``, unit rows: one view of each example.
      z2: ``[n, d]``, another view of the same.
      eps_sq: Squared precision, above 0.
      weight: Weight of the agreement of the views.
      normalize_mean: Whether means of views are brought to unit length.
      check: See :func:`coding_rate`.

    Returns:
      A scalar.

    Raises:
      ValueError: The views are of different shapes, or as :func:`coding_rate` refuses them.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"z1, z2: expected two views of the same shape, got {z1.shape} and {z2.shape}")
    z1, z2 = (_features(name, z, eps_sq, check) for name, z in (("z1", z1), ("z2", z2)))
    mean = (z1 + z2) / 2
    mean = linalg.unit_vectors(mean) if normalize_mean else mean
    return -coding_rate(mean, eps_sq, check=False) / 2 - weight * jnp.mean(jnp.sum(z1 * z2, axis=1))


def _log_det(positive: jax.Array) -> jax.Array:
    """``logdet(I + G)`` of ``[..., d, d]``."""
    factor = jnp.linalg.cholesky(positive + linalg.eye_like(positive))
    return 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_dets(z, w, block_size):
    """``logdet(I + sum_i w_ij z_i z_i^T)`` for each column ``j`` of weights ``w [n, clusters]``, as ``[clusters]``."""
    return linalg.map_row_blocks(lambda columns: _log_det(_weighted_grams(z, columns)), w.T, block_size)


def _weighted_grams(z, columns):
    """``[block, d, d]`` of columns of weights ``[block, n]``."""
    return linalg.gram(z[None] * columns[:, :, None], jnp.broadcast_to(z[None], (len(columns), *z.shape)))


def _log_dets_forward(z, w, block_size):
    return _log_dets(z, w, block_size), (z, w)


def _log_dets_backward(block_size, kept, g):
    """``2 sum_j g_j Diag(w_j) Z A_j^-1`` in ``Z``, and ``g_j z_i^T A_j^-1 z_i`` in ``w_ij``."""
    z, w = kept

    def of_block(block):
        columns, g = block
        grams = _weighted_grams(z, columns)
        eye = linalg.eye_like(grams)
        inverses = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(grams + eye), True), eye)
        solved = linalg.times(z[None], inverses)
        in_z = jnp.einsum("cn,cnd->nd", 2 * g[:, None] * columns, solved, precision=jax.lax.Precision.HIGHEST)
        return in_z, g[:, None] * jnp.sum(solved * z[None], axis=2)

    in_z, in_w = _sum_and_rows(of_block, (w.T, g), block_size)
    return in_z, in_w.T


def _sum_and_rows(f, rows, block_size):
    """Applies ``f`` to blocks as :func:`subspace_jax.linalg.map_row_blocks`; the first of its results is summed."""
    count = len(rows[0])
    if count <= block_size:
        return f(rows)
    blocks = -(-count // block_size)

    def grouped(x):
        x = jnp.pad(x, [(0, blocks * block_size - count)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(block_size, blocks, *x.shape[1:]), 0, 1)

    def step(total, block):
        part, own = f(block)
        return total + part, own

    blocked = jax.tree.map(grouped, rows)
    shape = jax.eval_shape(f, jax.tree.map(lambda x: x[0], blocked))[0]
    total, own = jax.lax.scan(step, jnp.zeros(shape.shape, shape.dtype), blocked)
    return total, jnp.swapaxes(own, 0, 1).reshape(-1, own.shape[-1])[:count]


_log_dets.defvjp(_log_dets_forward, _log_dets_backward)


def _features(name, z, eps_sq, check):
    """Returns features in float32 or wider; raises for what can't serve."""
    if z.ndim != 2 or not z.size:
        raise ValueError(f"{name}: expected features [n, d], got shape {z.shape}")
    if isinstance(eps_sq, numbers.Real) and not eps_sq > 0:
        raise ValueError(f"eps_sq: expected a squared precision above 0, got {eps_sq}")
    linalg.check_finite(name, z)
    if check and linalg.is_here(z):
        with jax.ensure_compile_time_eval():
            off = float(jnp.max(jnp.abs(jnp.linalg.norm(z.astype(linalg.working_dtype(z)), axis=1) - 1)))
        if off > _UNIT:
            raise ValueError(f"{name}: expected rows of unit length, got one that is off by {off:.3g}")
    return z.astype(linalg.working_dtype(z))


def _check_membership(m, mass):
    linalg.check_finite("m", m)
    if not linalg.is_here(m):
        return
    with jax.ensure_compile_time_eval():
        least, filled = float(jnp.min(m)), np.asarray(jnp.any(m > 0, axis=0))
    if least < 0:
        raise ValueError(f"m: expected memberships that are not negative, got {least:g}")
    if mass == "unit" and not filled.all():
        empty = int(np.argmin(filled))
        raise ValueError(f"m: expected an example in each cluster of unit mass, got none in column {empty}")
