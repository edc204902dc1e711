"""Doubly stochastic memberships of points in points, their clusters, and their rank (MLC, arXiv 2301.01805).

The kernel ``|C C^T|`` and the iterations are those of its successor CPP (arXiv 2306.05272): the code of MLC itself
could not be had.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import SpectralClustering

KERNELS = ("abs", "inner")
_NUMBERS_AT_A_TIME = 2**24


def membership(
    c: jax.Array, eta: float = 0.175, kernel: str = "abs", n_iter: int = 5, grad: str = "stop_v"
) -> jax.Array:
    """Membership of each example in each other, the Sinkhorn projection of the kernel of cluster features.

    Args:
      c: Cluster features ``[n, d]``, unit rows.
      eta: Weight of the entropy, above 0; a small one gives the identity, a large one 1/n.
      kernel: "abs" for ``|C C^T|``, "inner" for ``C C^T`` as in the paper.
      n_iter: Updates of a potential, see :func:`subspace_jax.linalg.sinkhorn`.
      grad: Likewise.

    Returns:
      ``[n, n]``, float32 or wider, not negative; rows sum to 1 for an odd ``n_iter``, columns nearly.

    Raises:
      ValueError: ``c`` is no matrix or (where its values are known) not finite, ``kernel`` is unknown, or another
        argument is as :func:`subspace_jax.linalg.sinkhorn` refuses it.
    """
    c = _checked(c, kernel)
    return linalg.sinkhorn(_kernel(c, c, kernel), eta, n_iter, grad).plan


def membership_product(
    c: jax.Array, eta: float = 0.175, kernel: str = "abs", n_iter: int = 5, *, block_size: int | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The symmetric affinity ``(Gamma + Gamma^T) / 2`` of :func:`membership` as a function, without any ``[n, n]``.

    Blocks of rows of the kernel are formed again in each iteration and each product, which cost ``2 n^2 d`` and
    ``2 n^2 (d + p)`` multiplications.

    Args:
      c: Cluster features ``[n, d]``; other arguments: see :func:`membership`.
      eta: See there.
      kernel: See there.
      n_iter: See there.
      block_size: Rows at a time; by default so many that a block takes 64 MB.

    Returns:
      ``v [n, p] -> [n, p]``, for :func:`subspace_jax.linalg.spectral_clustering`.

    Raises:
      ValueError: See :func:`membership`.
    """
    c = _checked(c, kernel)
    linalg.check_sinkhorn(eta, n_iter)
    n = c.shape[0]
    block_size = max(1, min(n, _NUMBERS_AT_A_TIME // n)) if block_size is None else block_size

    # The kernel is symmetric: rows and columns are updated alike.
    def half(other):
        def of_block(rows):
            return jax.nn.logsumexp((_kernel(rows, c, kernel) + other[None]) / eta, axis=1)

        return -eta * (math.log(n) + linalg.map_row_blocks(of_block, c, block_size))

    u, v = linalg.alternating_potentials(half, half, jnp.zeros(n, c.dtype), n_iter)

    def product(x):
        def of_block(block):
            rows, u_rows, v_rows = block
            s = _kernel(rows, c, kernel)
            plan = jnp.exp((s + u_rows[:, None] + v[None]) / eta) + jnp.exp((s + v_rows[:, None] + u[None]) / eta)
            return linalg.times(plan, x) * (n / 2)

        return linalg.map_row_blocks(of_block, (c, u, v), block_size)

    return product


def average_views(zs: jax.Array, gammas: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Averages views of the same examples, equation (6).

    Args:
      zs: Features of each view, ``[views, n, d]``.
      gammas: Memberships of each view, ``[views, n, n]``.

    Returns:
      Means of the features brought to unit length, ``[n, d]``, and of the memberships, ``[n, n]``.

    Raises:
      ValueError: The shapes do not fit.
    """
    if zs.ndim != 3 or gammas.shape != (*zs.shape[:2], zs.shape[1]):
        raise ValueError(
            f"zs, gammas: expected [views, n, d] and [views, n, n], got shapes {zs.shape} and {gammas.shape}"
        )
    return linalg.unit_vectors(jnp.mean(zs, axis=0)), jnp.mean(gammas, axis=0)


def numerical_rank(w: jax.Array, share: float = 0.95) -> jax.Array:
    """Least ``r`` whose largest singular values hold more than a share of the energy.

    Args:
      w: Features ``[l, d]``.
      share: Share of the sum of squared singular values, in (0, 1).

    Returns:
      An int32 scalar.

    Raises:
      ValueError: ``w`` is no matrix or not finite, or ``share`` is out of range.
    """
    if w.ndim != 2 or not w.size:
        raise ValueError(f"w: expected features [l, d], got shape {w.shape}")
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    linalg.check_finite("w", w)
    energy = jnp.square(jnp.linalg.svd(w.astype(linalg.working_dtype(w)), compute_uv=False))
    held = jnp.cumsum(energy) / jnp.maximum(jnp.sum(energy), jnp.finfo(energy.dtype).tiny)
    return jnp.minimum(jnp.sum(held <= share) + 1, len(energy)).astype(jnp.int32)


def cluster_membership(
    c: jax.Array,
    k: int,
    key: jax.Array,
    *,
    eta: float = 0.175,
    kernel: str = "abs",
    n_iter: int = 5,
    block_size: int | None = None,
) -> SpectralClustering:
    """Spectral clustering of all memberships, by products with them.

    Args:
      c: Cluster features ``[n, d]``.
      k: Number of clusters.
      key: Key of the eigensolver and of k-means.
      eta: Other arguments: see :func:`membership_product`.
      kernel: See there.
      n_iter: See there.
      block_size: See there.

    Returns:
      Assignments ``[n]`` int32, and the embedding.

    Raises:
      ValueError: See :func:`membership`; or ``k`` is not between 1 and ``n``.
    """
    product = membership_product(c, eta, kernel, n_iter, block_size=block_size)
    return linalg.spectral_clustering(key, product, k, n=c.shape[0])


def check_kernel(kernel: str) -> None:
    """Raises unless the kernel is known."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")


def _checked(c, kernel):
    check_kernel(kernel)
    if c.ndim != 2 or not c.size:
        raise ValueError(f"c: expected cluster features [n, d], got shape {c.shape}")
    linalg.check_finite("c", c)
    return c.astype(linalg.working_dtype(c))


def _kernel(rows, c, kernel):
    s = linalg.times(rows, c.T)
    return jnp.abs(s) if kernel == "abs" else s
