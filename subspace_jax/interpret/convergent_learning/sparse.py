"""Each unit of a network as a sparse linear combination of the units of another (arXiv 1511.07543, section 4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.interpret.convergent_learning.statistics import standardized
from subspace_jax.linalg import gram, times, working_dtype


class SparseMap(NamedTuple):
    """A sparse linear map between standardized units.

    Attributes:
      w: ``[p, q]``; column ``j`` predicts unit ``j`` of the second network.
      loss: ``[q]``, half the mean squared error of each unit: 1/2 where nothing is explained, so ``R^2 = 1 - 2 loss``.
      nnz: Nonzero entries of ``w``.
      residual: The largest violation of the optimality conditions.  The solution is exact up to it.
      steps: Iterations taken.
    """

    w: jax.Array
    loss: jax.Array
    nnz: jax.Array
    residual: jax.Array
    steps: jax.Array


def sparse_predict(
    x: jax.Array, y: jax.Array, lam: jax.typing.ArrayLike, max_iter: int = 5000, tol: float = 1e-5
) -> SparseMap:
    """Predicts the units of ``y`` from those of ``x`` with an L1 penalty, all standardized to mean 0 and variance 1.

    ``min_w ||y_j - X w_j||^2 / (2 n) + lam ||w_j||_1`` for every unit ``j``, by FISTA on the correlations, which needs
    no examples after them.  See :func:`sparse_predict_correlations`.

    Args:
      x: Activations ``[n, p]``, floating point.
      y: ``[n, q]``, of the same examples.
      lam: The penalty.
      max_iter: Most iterations.
      tol: Violation of the optimality conditions at which to stop.

    Returns:
      The map, float32 or wider.  Weights of constant units are 0.

    Raises:
      ValueError: The numbers of examples differ, or ``lam`` is negative.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or 0 in x.shape + y.shape:
        raise ValueError(f"x, y: expected [n, p] and [n, q] of the same examples, got {x.shape} and {y.shape}")
    (x, _), (y, _) = (standardized(a.astype(working_dtype(x, y))) for a in (x, y))
    n = x.shape[0]
    return sparse_predict_correlations(gram(x, x) / n, gram(x, y) / n, lam, max_iter, tol)


def sparse_predict_correlations(
    cor_xx: jax.Array, cor_xy: jax.Array, lam: jax.typing.ArrayLike, max_iter: int = 5000, tol: float = 1e-5
) -> SparseMap:
    """:func:`sparse_predict` from correlations, such as those of :func:`unit_stats_finalize`.

    FISTA (Beck and Teboulle, 2009), with the momentum of a unit reset where it points uphill (arXiv 1204.3982).  Takes
    ``p^2 q`` operations an iteration, sharded over columns without communication.  With ``g = cor_xx w - cor_xy`` an
    entry of ``w`` is optimal where ``g = -lam sign(w)``, or ``|g| <= lam`` for 0; ``residual`` is the worst violation.

    Args:
      cor_xx: Correlations ``[p, p]`` within the first network.
      cor_xy: Correlations ``[p, q]`` with the second.
      lam: See :func:`sparse_predict`.
      max_iter: See :func:`sparse_predict`.
      tol: See :func:`sparse_predict`.

    Returns:
      See :func:`sparse_predict`.

    Raises:
      ValueError: Shapes do not match, or ``lam`` is negative.
    """
    if cor_xx.ndim != 2 or cor_xy.ndim != 2 or cor_xx.shape != (cor_xy.shape[0],) * 2:
        raise ValueError(f"cor_xx, cor_xy: expected [p, p] and [p, q], got {cor_xx.shape} and {cor_xy.shape}")
    if not isinstance(lam, jax.core.Tracer) and not float(lam) >= 0:
        raise ValueError(f"lam: expected 0 or more, got {lam}")
    lam = jnp.asarray(lam, cor_xy.dtype)
    largest = jnp.max(jnp.linalg.eigvalsh(cor_xx))
    step = 1 / jnp.maximum(largest, 1e-30)

    def violation(w):
        gradient = times(cor_xx, w) - cor_xy
        at_zero = jnp.maximum(jnp.abs(gradient) - lam, 0)
        return jnp.max(jnp.where(w == 0, at_zero, jnp.abs(gradient + lam * jnp.sign(w))))

    def advance(state):
        w, ahead, t, _, i = state
        new = _soft_threshold(ahead - step * (times(cor_xx, ahead) - cor_xy), step * lam)
        uphill = jnp.sum((ahead - new) * (new - w), axis=0, keepdims=True) > 0
        t = jnp.where(uphill, 1, t)
        following = (1 + jnp.sqrt(1 + 4 * jnp.square(t))) / 2
        return new, new + jnp.where(uphill, 0, (t - 1) / following) * (new - w), following, violation(new), i + 1

    def unfinished(state):
        return (state[3] > tol) & (state[4] < max_iter)

    start = jnp.zeros_like(cor_xy)
    state = (start, start, jnp.ones((1, cor_xy.shape[1]), cor_xy.dtype), violation(start), jnp.zeros((), jnp.int32))
    w, _, _, residual, steps = jax.lax.while_loop(unfinished, advance, state)
    # A unit that varies has variance 1; one that does not is predicted by 0.
    explained = 2 * jnp.sum(w * cor_xy, axis=0) - jnp.sum(w * times(cor_xx, w), axis=0)
    return SparseMap(w, (1 - explained) / 2, jnp.sum(w != 0), residual, steps)


def _soft_threshold(a: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.sign(a) * jnp.maximum(jnp.abs(a) - t, 0)
