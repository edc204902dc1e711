"""Embeddings of nodes: leading left vectors of smoothed attributes, and of their modularity."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.cluster.s2cag.smoothing import Smoothed, products_of


def randomized_left_svd(
    Z: jax.Array | Smoothed,
    k: int,
    tau: int,
    key: jax.Array | None = None,
    *,
    oversample: int = 10,
    G: jax.Array | None = None,
    drop_first: bool = True,
) -> jax.Array:
    """Leading left singular vectors of a matrix, which may be known by its products alone.

    A random sketch, power steps that are orthonormalized, and a Rayleigh-Ritz step; the spaces are those of the plain
    iteration ``G <- Z^T Z G``.

    Args:
      Z: ``[n, d]``, or its products.
      k: Vectors to return, static.
      tau: Power steps.
      key: Key of the sketch; that of seed 0 by default.
      oversample: Further columns of the sketch; fewer where ``n`` or ``d`` has no room for them.
      G: The sketch itself, ``[d, q]``, instead.
      drop_first: Whether to leave out the first vector, nearly constant for smoothed attributes, and return the next.

    Returns:
      ``[n, k]``, orthonormal; in each column the entry of largest magnitude is positive.

    Raises:
      ValueError: ``k`` or ``tau`` is out of range, or ``G`` has another shape.
    """
    z = Z if isinstance(Z, Smoothed) else products_of(Z)
    (n, d), skipped = z.shape, int(drop_first)
    if not 1 <= k <= min(n, d) - skipped:
        what = " and the first one that is dropped" * skipped
        raise ValueError(f"k: expected 1 to {min(n, d) - skipped} vectors{what} of a {n} x {d} matrix, got {k}")
    if oversample < 0 or (linalg.is_here(tau) and tau < 0):
        raise ValueError(f"tau, oversample: expected 0 or more, got {tau} and {oversample}")
    if G is None:
        width = min(max(k + oversample, k + skipped), n, d)
        G = jax.random.normal(jax.random.key(0) if key is None else key, (d, width), z.dtype)
    elif G.ndim != 2 or G.shape[0] != d or not k + skipped <= G.shape[1] <= min(n, d):
        raise ValueError(f"G: expected [{d}, {k + skipped} to {min(n, d)}], got {G.shape}")

    def step(_, g):
        return linalg.orthonormal_columns(z.apply_T(linalg.orthonormal_columns(z.apply(g))))

    q = linalg.orthonormal_columns(z.apply(jax.lax.fori_loop(0, tau, step, linalg.orthonormal_columns(G))))
    # The SVD of a small core: of q^T Z = core^T right^T.
    projected = z.apply_T(q)
    core = linalg.gram(linalg.orthonormal_columns(projected), projected)
    u = linalg.times(q, linalg.canonical_svd(core.T)[0])[:, skipped : k + skipped]
    return u * linalg.canonical_signs(u)[None]


def modularity_embedding(
    Z: jax.Array | Smoothed, k: int, gamma: float, tau: int, key: jax.Array | None = None, Q0: jax.Array | None = None
) -> jax.Array:
    """Leading eigenvectors of the modularity of smoothed attributes, by orthogonal iteration.

    With ``r = max(Z 1, 0)``, ``Z' = diag(sqrt(r)) Z`` and ``w = Z' Z'^T 1``, the operator is ``Z' Z'^T - gamma w w^T /
    (1^T w)``.  (The authors' code multiplies by the root of ``r``, where a division would normalize.)

    Args:
      Z: ``[n, d]``, or its products.
      k: Eigenvectors, static.
      gamma: Resolution: the larger, the smaller the clusters.
      tau: Iterations.
      key: Key of the start; that of seed 0 by default.
      Q0: The start itself, ``[n, k]``, instead.

    Returns:
      ``[n, k]``, orthonormal.

    Raises:
      ValueError: ``k``, ``gamma`` or ``tau`` is out of range, ``Q0`` has another shape, or (where its value is known)
        ``1^T w`` is zero.
    """
    z = Z if isinstance(Z, Smoothed) else products_of(Z)
    n = z.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of nodes, got {k}")
    if linalg.is_here(tau) and linalg.is_here(gamma) and (tau < 0 or not gamma >= 0):
        raise ValueError(f"gamma, tau: expected 0 or more, got {gamma} and {tau}")
    if Q0 is None:
        Q0 = jax.random.normal(jax.random.key(0) if key is None else key, (n, k), z.dtype)
    elif Q0.shape != (n, k):
        raise ValueError(f"Q0: expected [{n}, {k}], got {Q0.shape}")
    root = root_of_sums(z)
    omega = root * z.apply(z.apply_T(root))
    total = jnp.sum(omega)
    if linalg.is_here(total) and not float(total) > 0:
        raise ValueError("Z: expected smoothed attributes that are not all zero, or negative in sum")

    def step(_, q):
        product = root * z.apply(z.apply_T(root * q))
        return linalg.orthonormal_columns(product - gamma / total * omega * linalg.gram(omega, q))

    return jax.lax.fori_loop(0, tau, step, linalg.orthonormal_columns(Q0))


def root_of_sums(z: Smoothed) -> jax.Array:
    """Roots ``[n, 1]`` of the sums of the rows, 0 where one is negative."""
    return jnp.sqrt(jnp.maximum(z.apply(jnp.ones((z.shape[1], 1), z.dtype)), 0))
