"""How alike items of two feature spaces are: cosines, local CKA, and representations relative to anchors."""

import jax
import jax.numpy as jnp

from subspace_jax.interpret.platos_cave_3d.core import check_finite, check_pairs
from subspace_jax.linalg import PairMoments, pair_moments, pairwise_sq_distances, times, unit_vectors, working_dtype
from subspace_jax.metrics import median_sigma

KERNELS = ("linear", "rbf")


def cosine_scores(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosines of all pairs of rows.

    Args:
      a: ``[items, n]``, floating point.
      b: ``[others, n]``.

    Returns:
      ``[items, others]``, float32 or wider.

    Raises:
      ValueError: The widths differ.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected vectors of one width, got {a.shape} and {b.shape}")
    dtype = working_dtype(a, b)
    return times(unit_vectors(a.astype(dtype)), unit_vectors(b.astype(dtype)).T)


def relative_representation(z: jax.Array, anchors: jax.Array) -> jax.Array:
    """Cosines of items to anchors: coordinates that do not depend on a rotation of the space (arXiv 2209.15430).

    Items of two spaces compare by :func:`cosine_scores` of their representations relative to the same anchors.

    Args:
      z: ``[items, n]``, floating point.
      anchors: ``[anchors, n]``.

    Returns:
      ``[items, anchors]``, float32 or wider.

    Raises:
      ValueError: The widths differ.
    """
    return cosine_scores(z, anchors)


def local_cka_scores(
    xa: jax.Array, ya: jax.Array, xq: jax.Array, yq: jax.Array, kernel: str = "linear", chunk: int = 1024
) -> jax.Array:
    """CKA of the anchors and one more pair, for every pair of queries; it is highest where they belong together.

    ``G_ij = CKA(K[xa; xq_i], K[ya; yq_j])`` (arXiv 2401.05224).  Adding a row to centred kernels adds a border to
    them, and all ``G`` follow from the kernels of the anchors and their products with the borders: ``n_A`` times less
    work than one CKA a pair.  "linear" is exact and never forms a kernel.

    Args:
      xa: Anchors in the first space, ``[anchors, p]``, floating point.
      ya: The same anchors in the second, ``[anchors, q]``.
      xq: Queries in the first space, ``[items, p]``.
      yq: Queries in the second, ``[others, q]``.
      kernel: "linear", or "rbf" with the width :func:`subspace_jax.metrics.median_sigma` of the anchors on each side.
        (The reference takes the median over the query too, which moves it by few ranks.)
      chunk: Anchors whose rows of both kernels are held at a time, for "rbf".

    Returns:
      ``[items, others]``, float32 or wider.

    Raises:
      ValueError: Shapes do not match, the kernel is unknown, or a concrete array is not finite.
    """
    xa, ya, xq, yq = (jnp.asarray(z) for z in (xa, ya, xq, yq))
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    check_queries(xa, ya, xq, yq)
    if kernel == "linear":
        return local_cka_of_moments(pair_moments(xa, ya), xq, yq)
    dtype = working_dtype(xa, ya, xq, yq)
    x, y = ((a.astype(dtype), q.astype(dtype), median_sigma(a.astype(dtype))) for a, q in ((xa, xq), (ya, yq)))
    means, products = _anchor_kernels(x, y, min(chunk, xa.shape[0]))
    borders = [_border(*side, mean) for side, mean in zip((x, y), means, strict=True)]
    cross = times(borders[0][0], borders[1][0].T)
    own = [(jnp.sum(jnp.square(border), axis=1), corner) for border, corner in borders]
    return _bordered(xa.shape[0], products, cross, own)


def local_cka_of_moments(moments: PairMoments, xq: jax.Array, yq: jax.Array) -> jax.Array:
    """:func:`local_cka_scores` with the linear kernel, from moments of the anchors."""
    # In units of the largest deviation: fourth powers of features may leave the range of float32.
    n = jnp.maximum(moments.count, 1).astype(moments.xy.dtype)
    ux, uy = (jnp.sqrt(jnp.trace(c) / n) for c in (moments.xx, moments.yy))
    d = (xq.astype(ux.dtype) - moments.mean_x[None]) / ux
    e = (yq.astype(uy.dtype) - moments.mean_y[None]) / uy
    xx, xy, yy = moments.xx / ux**2, moments.xy / ux / uy, moments.yy / uy**2
    cross = times(times(d, xy), e.T)
    own = [(jnp.sum(times(z, c) * z, axis=1), jnp.sum(jnp.square(z), axis=1)) for z, c in ((d, xx), (e, yy))]
    return _bordered(n, [jnp.sum(jnp.square(c)) for c in (xy, xx, yy)], cross, own)


def check_queries(xa: jax.Array, ya: jax.Array, xq: jax.Array, yq: jax.Array) -> None:
    """Raises for anchors that are no pairs, and for queries of other widths."""
    check_pairs(xa, ya)
    for name, z, anchors in (("xq", xq, xa), ("yq", yq, ya)):
        if z.ndim != 2 or z.shape[1] != anchors.shape[1]:
            raise ValueError(f"{name}: expected queries of the width of the anchors, {anchors.shape[1]}, got {z.shape}")
    check_finite(xa=xa, ya=ya, xq=xq, yq=yq)


def _bordered(n, products, cross, own):
    """CKA of kernels of ``n`` anchors, centred over these, with a border each.

    A border is centred too: its entries, products of the query with the anchors, sum to 0.  In the kernel that is
    centred over all ``n + 1``, entries and corner so weigh ``n / (n + 1)`` and its square.

    Args:
      n: Number of anchors.
      products: Sums of products of the entries of both kernels, of the first with itself, and of the second.
      cross: Products of the borders of all pairs, ``[items, others]``.
      own: For either side, products of a border with itself and the corner, ``[items]`` each.
    """
    t = n / (n + 1)
    both, *alone = products
    (_, corner_x), (_, corner_y) = own
    covariance = both + 2 * t * cross + t**2 * corner_x[:, None] * corner_y[None]
    norms = [
        base + 2 * t * square + t**2 * jnp.square(corner) for base, (square, corner) in zip(alone, own, strict=True)
    ]
    return covariance / jnp.sqrt(norms[0])[:, None] / jnp.sqrt(norms[1])[None]


def _rbf(a, b, sigma):
    return jnp.exp(-pairwise_sq_distances(a, b) / (2 * sigma**2))


def _anchor_kernels(x, y, chunk):
    """Row means of both kernels of the anchors, and sums of products of what centring leaves: three numbers."""
    sides = [(anchors, sigma) for anchors, _, sigma in (x, y)]
    index = jnp.arange(sides[0][0].shape[0])

    def rows(i):
        return [_rbf(anchors[i][None], anchors, sigma)[0] for anchors, sigma in sides]

    means = jax.lax.map(lambda i: [jnp.mean(row) for row in rows(i)], index, batch_size=chunk)

    def products(i):
        a, b = (row - m - m[i] + jnp.mean(m) for row, m in zip(rows(i), means, strict=True))
        return jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)

    return means, [jnp.sum(f) for f in jax.lax.map(products, index, batch_size=chunk)]


def _border(anchors, queries, sigma, means):
    """The centred kernel of queries with anchors, ``[items, anchors]``, and of each query with itself, ``[items]``."""
    border = _rbf(queries, anchors, sigma)
    own, whole = jnp.mean(border, axis=1, keepdims=True), jnp.mean(means)
    return border - own - means[None] + whole, 1 - 2 * own[:, 0] + whole
