"""Similarities of two representations, from what of each side can be computed once for all shuffles of the examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.interpret.convergent_learning.statistics import UnitMoments, standardized
from subspace_jax.linalg import gram, nearest_rows, times, unit_vectors, whitened_columns
from subspace_jax.metrics import rbf_kernel, unbiased_hsic
from subspace_jax.metrics.neighbor_agreement import common_subsequences
from subspace_jax.metrics.representation_similarity import leading_basis, unit_norm

_KEEP = 0.99

CORRELATION = ("semi_match", "max_match")
CCA = ("cca_mean", "cca_r2", "pwcca")
REGRESSION = ("r2_x_from_y", "r2_y_from_x")
LINEAR = ("linear_cka", "debiased_cka", "procrustes")
RBF = ("rbf_cka", "debiased_rbf_cka")
NEIGHBORS = ("mutual_knn", "cycle_knn", "lcs_knn", "cknna")
MEASURES = (*LINEAR, *CCA, "svcca", *REGRESSION, *CORRELATION, *RBF, *NEIGHBORS)
# Those that follow from covariances, and so from a stream of examples.
OF_MOMENTS = ("linear_cka", "procrustes", *CCA, "svcca", *REGRESSION, *CORRELATION)
# Those without a singular value decomposition, an assignment or a kernel for every shuffle.
FAST = ("linear_cka", "debiased_cka", "cca_r2", *REGRESSION, "semi_match")


class Linear(NamedTuple):
    """Centered columns ``[n, p]`` of Frobenius norm 1, squared lengths of rows, own criteria of CKA, and correlation's.

    ``standard [n, p]`` has columns of mean 0 and length 1, or 0.  Where there are more columns than examples,
    ``products [n, n]`` are those of the rows; None otherwise.
    """

    unit: jax.Array
    products: jax.Array | None
    squares: jax.Array
    own: jax.Array
    own_debiased: jax.Array
    standard: jax.Array


class Subspace(NamedTuple):
    """Orthonormal basis ``[n, r]`` of a span, 0 for dependent directions; its dimension; products with the columns."""

    basis: jax.Array
    rank: jax.Array
    loads: jax.Array


class Kernel(NamedTuple):
    """A kernel ``[n, n]``, the same without means, and the own criteria of both forms of CKA."""

    plain: jax.Array
    centered: jax.Array
    own: jax.Array
    own_debiased: jax.Array


class Neighborhood(NamedTuple):
    """Nearest examples by cosine ``[n, k]``, whether an example is one ``[n, n]``, cosines, the own HSIC of CKNNA."""

    index: jax.Array
    near: jax.Array
    cosines: jax.Array
    own: jax.Array


class Side(NamedTuple):
    """What of one representation does not depend on the other; what no measure needs is None."""

    linear: Linear
    span: Subspace | None
    leading: Subspace | None
    kernel: Kernel | None
    neighborhood: Neighborhood | None


def prepare(x: jax.Array, measures: tuple[str, ...], k: int) -> Side:
    """Prepares one representation ``[n, p]``, float32 or float64, for measures with ``k`` neighbours."""
    wanted, n = set(measures), x.shape[0]
    unit = unit_norm(x)
    squares = jnp.sum(jnp.square(unit), axis=1)
    products = None if x.shape[1] <= n else times(unit, unit.T)
    own = jnp.sum(jnp.square(gram(unit, unit) if products is None else products))
    standard = standardized(x)[0] / jnp.sqrt(jnp.asarray(n, x.dtype))
    linear = Linear(unit, products, squares, own, _debiased(own, squares, squares), standard)
    span = leading = kernel = neighborhood = None
    if wanted & {*CCA, *REGRESSION}:
        basis = whitened_columns(x)[0]
        rank = jnp.sum((jnp.sum(jnp.square(basis), axis=0) > 0.5).astype(x.dtype))
        span = Subspace(basis, rank, gram(basis, unit))
    if "svcca" in wanted:
        basis, kept = leading_basis(x, _KEEP)
        leading = Subspace(basis, kept, gram(basis, unit))
    if wanted & set(RBF):
        k_rbf = rbf_kernel(x)
        centered = k_rbf - jnp.mean(k_rbf, axis=0, keepdims=True)
        centered = centered - jnp.mean(centered, axis=1, keepdims=True)
        kernel = Kernel(k_rbf, centered, jnp.sum(jnp.square(centered)), unbiased_hsic(k_rbf, k_rbf))
    if wanted & set(NEIGHBORS):
        vectors = unit_vectors(x)
        index = nearest_rows(vectors, vectors, k, exclude=jnp.arange(n))[1]
        near = jnp.zeros((n, n), bool).at[jnp.arange(n)[:, None], index].set(True)
        cosines = times(vectors, vectors.T)
        kept = jnp.where(near, cosines, 0)
        neighborhood = Neighborhood(index, near, cosines, unbiased_hsic(kept, kept))
    return Side(linear, span, leading, kernel, neighborhood)


def shuffled(side: Side, order: jax.Array) -> Side:
    """The side with its examples in another order."""
    linear, span, leading, kernel, neighborhood = side
    linear = linear._replace(unit=linear.unit[order], squares=linear.squares[order], standard=linear.standard[order])
    if linear.products is not None:
        linear = linear._replace(products=linear.products[order][:, order])
    if span is not None:
        span = span._replace(basis=span.basis[order])
    if leading is not None:
        leading = leading._replace(basis=leading.basis[order])
    if kernel is not None:
        kernel = kernel._replace(plain=kernel.plain[order][:, order], centered=kernel.centered[order][:, order])
    if neighborhood is not None:
        inverse = jnp.argsort(order).astype(neighborhood.index.dtype)
        neighborhood = neighborhood._replace(
            index=inverse[neighborhood.index[order]],
            near=neighborhood.near[order][:, order],
            cosines=neighborhood.cosines[order][:, order],
        )
    return Side(linear, span, leading, kernel, neighborhood)


def score(x: Side, y: Side, measures: tuple[str, ...]) -> dict[str, jax.Array]:
    """All measures but ``max_match``, which needs the host, by name."""
    found = {}
    if set(measures) & set(LINEAR):
        found |= _linear(x.linear, y.linear, "procrustes" in measures)
    if "semi_match" in measures:
        found["semi_match"] = jnp.mean(jnp.max(gram(x.linear.standard, y.linear.standard), axis=1))
    if x.span is not None:
        found |= _subspaces(x, y, bool(set(measures) & {"cca_mean", "pwcca"}))
    if x.leading is not None:
        rho = jnp.linalg.svd(gram(x.leading.basis, y.leading.basis), compute_uv=False)
        found["svcca"] = jnp.sum(rho) / jnp.minimum(x.leading.rank, y.leading.rank)
    if x.kernel is not None:
        k, l = x.kernel, y.kernel
        found["rbf_cka"] = jnp.sum(k.centered * l.centered) / jnp.sqrt(k.own) / jnp.sqrt(l.own)
        own = jnp.sqrt(k.own_debiased) * jnp.sqrt(l.own_debiased)
        found["debiased_rbf_cka"] = unbiased_hsic(k.plain, l.plain) / own
    if x.neighborhood is not None:
        found |= _neighborhoods(x.neighborhood, y.neighborhood)
    return {name: found[name] for name in measures if name in found}


def _debiased(inner: jax.Array, d: jax.Array, e: jax.Array) -> jax.Array:
    """The unbiased criterion of linear kernels, times ``n (n - 3)``, of ``||x^T y||^2`` and squared lengths of rows."""
    n, through = d.shape[0], jnp.sum(d * e)
    return inner - through + jnp.sum(d) * jnp.sum(e) / ((n - 1) * (n - 2)) - 2 / (n - 2) * through


def _linear(x: Linear, y: Linear, with_svd: bool) -> dict[str, jax.Array]:
    if x.products is not None and y.products is not None:  # n^2 operations instead of n p q
        inner = jnp.sum(x.products * y.products)
    else:
        inner = jnp.sum(jnp.square(gram(x.unit, y.unit)))
    own = jnp.sqrt(x.own_debiased) * jnp.sqrt(y.own_debiased)
    found = {
        "linear_cka": inner / jnp.sqrt(x.own) / jnp.sqrt(y.own),
        "debiased_cka": _debiased(inner, x.squares, y.squares) / own,
    }
    if with_svd:
        found["procrustes"] = jnp.sum(jnp.linalg.svd(gram(x.unit, y.unit), compute_uv=False))
    return found


def _subspaces(x: Side, y: Side, with_svd: bool) -> dict[str, jax.Array]:
    cross, smaller = gram(x.span.basis, y.span.basis), jnp.minimum(x.span.rank, y.span.rank)
    found = {
        "cca_r2": jnp.sum(jnp.square(cross)) / smaller,
        "r2_x_from_y": jnp.sum(jnp.square(gram(y.span.basis, x.linear.unit))),
        "r2_y_from_x": jnp.sum(jnp.square(gram(x.span.basis, y.linear.unit))),
    }
    if with_svd:
        u, rho, _ = jnp.linalg.svd(cross, full_matrices=False)
        weights = jnp.sum(jnp.abs(gram(u, x.span.loads)), axis=1)
        found |= {"cca_mean": jnp.sum(rho) / smaller, "pwcca": jnp.sum(weights * rho) / jnp.sum(weights)}
    return found


def _neighborhoods(x: Neighborhood, y: Neighborhood) -> dict[str, jax.Array]:
    dtype, k = x.cosines.dtype, x.index.shape[1]
    both = x.near & y.near
    aligned = unbiased_hsic(jnp.where(both, x.cosines, 0), jnp.where(both, y.cosines, 0))
    return {
        "mutual_knn": jnp.mean(jnp.sum(both, axis=1).astype(dtype)) / k,
        "cycle_knn": jnp.mean(jnp.any(y.near & x.near.T, axis=1).astype(dtype)),
        "lcs_knn": jnp.mean(common_subsequences(x.index, y.index).astype(dtype)) / k,
        "cknna": aligned / (jnp.sqrt(x.own * y.own) + 1e-6),
    }


def score_moments(m: UnitMoments) -> dict[str, jax.Array]:
    """The measures of :data:`OF_MOMENTS` but ``max_match``, from moments of any number of examples."""
    size_x, size_y = (jnp.trace(c) for c in (m.cov_xx, m.cov_yy))
    norms = jnp.sqrt(jnp.sum(jnp.square(m.cov_xx / size_x))) * jnp.sqrt(jnp.sum(jnp.square(m.cov_yy / size_y)))
    scaled = m.cov_xy / jnp.sqrt(size_x) / jnp.sqrt(size_y)
    (tx, rank_x), (ty, rank_y) = _whitening(m.cor_xx, 1.0), _whitening(m.cor_yy, 1.0)
    cross, smaller = times(gram(tx, m.cor_xy), ty), jnp.minimum(rank_x, rank_y)
    u, rho, _ = jnp.linalg.svd(cross, full_matrices=False)
    weights = jnp.sum(jnp.abs(gram(times(tx, u), m.cor_xx * m.std_x[None])), axis=1)
    (lx, kept_x), (ly, kept_y) = _whitening(m.cov_xx, _KEEP), _whitening(m.cov_yy, _KEEP)
    leading = jnp.linalg.svd(times(gram(lx, m.cov_xy), ly), compute_uv=False)
    return {
        "linear_cka": jnp.sum(jnp.square(scaled)) / norms,
        "procrustes": jnp.sum(jnp.linalg.svd(scaled, compute_uv=False)),
        "cca_mean": jnp.sum(rho) / smaller,
        "cca_r2": jnp.sum(jnp.square(rho)) / smaller,
        "pwcca": jnp.sum(weights * rho) / jnp.sum(weights),
        "svcca": jnp.sum(leading) / jnp.minimum(kept_x, kept_y),
        "r2_x_from_y": jnp.sum(jnp.square(gram(ty, m.cor_xy.T) * m.std_x[None])) / size_x,
        "r2_y_from_x": jnp.sum(jnp.square(gram(tx, m.cor_xy) * m.std_y[None])) / size_y,
        "semi_match": jnp.mean(jnp.max(m.cor_xy, axis=1)),
    }


def _whitening(c: jax.Array, keep: float) -> tuple[jax.Array, jax.Array]:
    """Returns ``t [p, p]`` with ``t^T c t`` the identity on directions that hold a share of the trace; their number."""
    values, vectors = jnp.linalg.eigh(c)
    values, vectors = values[::-1], vectors[:, ::-1]
    shares = values / jnp.sum(values)
    kept = (jnp.cumsum(shares) - shares < keep) & (values > c.shape[0] * jnp.finfo(c.dtype).eps * values[0])
    weights = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return vectors * weights[None], jnp.sum(kept.astype(c.dtype))
