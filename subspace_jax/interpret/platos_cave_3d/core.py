"""Subspaces in which two paired feature spaces are correlated, and affine maps between them: from second moments.

Everything here is a function of counts, means and products of centred features, which sum over blocks of pairs and over
devices: no step holds all pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import (
    PairMoments,
    cca_from_covariance,
    gram,
    nan_for_infinite,
    pair_moments,
    times,
)


class CCASubspace(NamedTuple):
    """The directions of two feature spaces that are correlated most.

    Attributes:
      mean_x: Mean of the anchors, ``[p]``.
      mean_y: ``[q]``.
      wx: ``[p, k]``; projected anchors have unit variance, less by the ridge.
      wy: ``[q, k]``.
      rho: Canonical correlations of the anchors, ``[k]``, descending: too high where there are few for the widths, and
        shrunk by a ridge.
    """

    mean_x: jax.Array
    mean_y: jax.Array
    wx: jax.Array
    wy: jax.Array
    rho: jax.Array

    def leading(self, k: int) -> "CCASubspace":
        """Returns the subspace of the first ``k`` directions."""
        return self._replace(wx=self.wx[:, :k], wy=self.wy[:, :k], rho=self.rho[:k])


class AffineMap(NamedTuple):
    """The map ``z -> R z + b``.

    Attributes:
      R: ``[m, n]``.
      b: ``[m]``; zeros where it was fitted without.
    """

    R: jax.Array
    b: jax.Array


def project_moments(moments: PairMoments, sub: CCASubspace) -> PairMoments:
    """Returns the moments of the projections of pairs, ``k`` wide on both sides."""
    return PairMoments(
        count=moments.count,
        mean_x=times((moments.mean_x - sub.mean_x)[None], sub.wx)[0],
        mean_y=times((moments.mean_y - sub.mean_y)[None], sub.wy)[0],
        xx=gram(sub.wx, times(moments.xx, sub.wx)),
        xy=gram(sub.wx, times(moments.xy, sub.wy)),
        yy=gram(sub.wy, times(moments.yy, sub.wy)),
    )


def fit_cca_subspace(xa: jax.Array, ya: jax.Array, k: int = 50, reg: float = 1e-8, *, eps: float = 0.0) -> CCASubspace:
    """Finds the ``k`` directions of two feature spaces that are correlated most, by CCA of anchors.

    ``U diag(rho) V^T = S_x^-1/2 S_xy S_y^-1/2``, ``W_x = S_x^-1/2 U``, ``W_y = S_y^-1/2 V`` (arXiv 2503.05283, section
    3), of covariances with a ridge.  Costs ``n (p + q)^2`` operations; pairs may be sharded.  In float32, directions
    with less than about ``1e-7 p`` of the largest variance are dropped.

    Args:
      xa: Anchors in the first space, ``[anchors, p]``, floating point.
      ya: The same anchors in the second, ``[anchors, q]``.
      k: Number of directions, static.
      reg: Ridge on both covariances, as a share of their largest eigenvalue; a Python number.  Choose one, such as
        1e-3, where the anchors are not many times ``p + q``: correlations of other pairs are lower than ``rho`` then.
      eps: Ridge in the squared units of the features, added to that.

    Returns:
      The subspace, float32 or wider.  Signs are canonical.

    Raises:
      ValueError: The numbers of anchors differ, or are no more than ``k``; ``k`` exceeds a width; a concrete array is
        not finite; or both ridges are 0 and a covariance is singular, as there are no more anchors than features or a
        feature is constant.
    """
    xa, ya = jnp.asarray(xa), jnp.asarray(ya)
    check_anchors(xa, ya, k, reg == 0 and eps == 0)
    return subspace_of_moments(pair_moments(xa, ya), k, reg, eps)


def subspace_of_moments(moments: PairMoments, k: int, reg: float, eps: float = 0.0) -> CCASubspace:
    """:func:`fit_cca_subspace` from moments, without its checks of anchors.

    ``reg`` may be traced too, and is not checked then.

    Raises:
      ValueError: ``k`` is not between 1 and the smaller width, or a ridge is negative.
    """
    widths = moments.xy.shape
    if not 1 <= k <= min(widths):
        raise ValueError(f"k: expected 1 to {min(widths)}, the smaller of the widths {widths}, got {k}")
    traced = isinstance(reg, jax.Array)
    if not eps >= 0 or (not traced and not reg >= 0):
        raise ValueError(f"reg, eps: expected 0 or more, got {reg} and {eps}")
    freedom = jnp.maximum(moments.count - 1, 1).astype(moments.xy.dtype)

    def with_ridge(scatter):
        covariance = nan_for_infinite(scatter / freedom)
        ridge = reg * jnp.linalg.eigvalsh(covariance)[-1] if traced or reg else 0.0
        return covariance + (ridge + eps) * jnp.eye(len(covariance), dtype=covariance.dtype)

    found = cca_from_covariance(with_ridge(moments.xx), moments.xy / freedom, with_ridge(moments.yy), k)
    return CCASubspace(moments.mean_x, moments.mean_y, found.wx, found.wy, found.rho)


def project_x(sub: CCASubspace, x: jax.Array) -> jax.Array:
    """Projects features of the first space, ``[n, p]``, to the subspace, ``[n, k]``."""
    return times(x.astype(sub.wx.dtype) - sub.mean_x[None], sub.wx)


def project_y(sub: CCASubspace, y: jax.Array) -> jax.Array:
    """Projects features of the second space, ``[n, q]``, to the subspace, ``[n, k]``."""
    return times(y.astype(sub.wy.dtype) - sub.mean_y[None], sub.wy)


def fit_affine(
    src: jax.Array, tgt: jax.Array, ridge: float = 0.0, bias: bool = True, orthogonal: bool = False
) -> AffineMap:
    """The affine map of one set of vectors nearest to another in mean squared error.

    Args:
      src: ``[anchors, n]``, floating point.
      tgt: ``[anchors, m]``, anchor by anchor with ``src``.
      ridge: Weight of ``||R||_F^2`` beside the mean squared error, in the squared unit of ``src``.  With 0 and linearly
        dependent features the map is that of least norm.
      bias: Whether to fit ``b``.
      orthogonal: Whether ``R`` has orthonormal rows or columns (Procrustes); ``ridge`` is 0 then.

    Returns:
      The map; NaN where the input is not finite.

    Raises:
      ValueError: The numbers of anchors differ, ``ridge`` is negative, or both ``ridge`` and ``orthogonal`` are given.
    """
    if src.ndim != 2 or tgt.ndim != 2 or src.shape[0] != tgt.shape[0]:
        raise ValueError(
            f"src, tgt: expected the same anchors [anchors, n] and [anchors, m], got {src.shape}, {tgt.shape}"
        )
    return affine_of_moments(pair_moments(tgt, src), ridge, bias, orthogonal)


def affine_of_moments(
    moments: PairMoments, ridge: float = 0.0, bias: bool = True, orthogonal: bool = False
) -> AffineMap:
    """:func:`fit_affine` from the ``y`` to the ``x`` of moments."""
    if not ridge >= 0 or (ridge and orthogonal):
        raise ValueError(f"ridge: expected 0 or more, and 0 for an orthogonal map, got {ridge}")
    mx, my, n = moments.mean_x, moments.mean_y, jnp.maximum(moments.count, 1).astype(moments.xy.dtype)
    xy, yy = moments.xy / n, moments.yy / n
    if not bias:
        xy, yy = xy + mx[:, None] * my[None], yy + my[:, None] * my[None]
    if orthogonal:
        u, _, vt = jnp.linalg.svd(nan_for_infinite(xy), full_matrices=False)
        kernel = times(u, vt)
    else:
        values, vectors = jnp.linalg.eigh(nan_for_infinite(yy))
        rounding = yy.shape[0] * jnp.finfo(yy.dtype).eps * jnp.max(values)
        inverse = jnp.where(values > rounding, 1 / (jnp.where(values > rounding, values, 1) + ridge), 0)
        kernel = times(times(xy, vectors) * inverse[None], vectors.T)
    return AffineMap(kernel, mx - times(kernel, my[:, None])[:, 0] if bias else jnp.zeros_like(mx))


def apply_affine(affine: AffineMap, z: jax.Array) -> jax.Array:
    """Maps vectors ``[items, n]`` to ``[items, m]``."""
    return times(z.astype(affine.R.dtype), affine.R.T) + affine.b[None]


def check_anchors(xa: jax.Array, ya: jax.Array, k: int, no_ridge: bool) -> None:
    """Raises for anchors from which no subspace of ``k`` directions is found."""
    check_pairs(xa, ya)
    if not 1 <= k <= min(xa.shape[1], ya.shape[1]):
        raise ValueError(f"k: expected 1 to the smaller of the widths {xa.shape[1]} and {ya.shape[1]}, got {k}")
    if xa.shape[0] <= k:
        raise ValueError(f"xa, ya: expected more anchors than the {k} directions, got {xa.shape[0]}")
    check_finite(xa=xa, ya=ya)
    if not no_ridge:
        return
    if xa.shape[0] <= max(xa.shape[1], ya.shape[1]):
        raise ValueError(
            f"reg: expected more than 0 for {xa.shape[0]} anchors of widths {xa.shape[1]} and {ya.shape[1]}: their "
            "covariances are singular, and every correlation is 1"
        )
    for name, z in (("xa", xa), ("ya", ya)):
        constant = np.flatnonzero(np.ptp(np.asarray(z), axis=0) == 0) if is_known(z) else ()
        if len(constant):
            raise ValueError(
                f"{name}: feature {constant[0]} is constant over the anchors, so its variance is 0; drop it, or give "
                "reg > 0"
            )


def check_pairs(xa: jax.Array, ya: jax.Array) -> None:
    """Raises unless both are features of the same anchors."""
    if xa.ndim != 2 or ya.ndim != 2 or xa.shape[0] != ya.shape[0]:
        raise ValueError(f"xa, ya: expected the same anchors [anchors, p], [anchors, q], got {xa.shape} and {ya.shape}")


def check_finite(**arrays: jax.Array) -> None:
    """Raises where a concrete array holds NaN or infinity."""
    for name, z in arrays.items():
        if is_known(z) and not bool(jnp.all(jnp.isfinite(z))):
            raise ValueError(f"{name}: expected finite features, got NaN or infinity")


def is_known(x: jax.Array) -> bool:
    """Whether the values of an array can be looked at."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
