"""Attributes smoothed over a graph: a polynomial of the propagation matrix, applied by Horner's rule."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg
from subspace_jax.cluster.s2cag.graph import GraphOperator

SERIES = ("paper", "recursion")
Apply = Callable[[jax.Array], jax.Array]


class Smoothed(NamedTuple):
    """Smoothed attributes ``Z [n, d]`` by their products.

    Attributes:
      apply: Returns ``Z g`` of ``g [d, q]``.
      apply_T: Returns ``Z^T y`` of ``y [n, q]``.
      shape: ``(n, d)``.
      dtype: Of all of them.
    """

    apply: Apply
    apply_T: Apply
    shape: tuple[int, int]
    dtype: jnp.dtype


def smooth(p: GraphOperator, x: jax.Array, T: int, alpha: float, series: str = "paper") -> jax.Array:
    """Normalized smoothed representation ``Z`` of attributes.

    ``paper``: ``sum_{t=0..T} w_t P^t X`` with weights in proportion to ``alpha^t`` that add up to 1.  ``recursion``
    (the authors' code): ``c (sum_{t=0..T-1} alpha^{t+1} P^t X + alpha^T P^T X)`` with ``c = (1 - alpha) / (1 -
    alpha^{T+1})``, and ``c = T`` for ``alpha = 1``.  Steps are scaled, so that ``alpha^T`` may be beyond float32.

    Args:
      p: Propagation matrix.
      x: Normalized attributes, ``[rows, d]``.
      T: Order of the polynomial, static.
      alpha: Ratio of the weights of successive powers, static; may be more than 1.
      series: ``"paper"`` or ``"recursion"``.

    Returns:
      ``[rows, d]``, in the dtype of ``x``.

    Raises:
      ValueError: ``T``, ``alpha`` or ``series`` is out of range, or ``x`` has another number of rows.
    """
    _check(T, alpha, series)
    if x.ndim != 2 or x.shape[0] != p.rows:
        raise ValueError(f"x: expected attributes [{p.rows}, d] of the graph's nodes, got shape {x.shape}")
    return _horner(p.matvec, x, T, alpha, series)


def smooth_operator(p: GraphOperator, T: int, alpha: float) -> tuple[Apply, Apply]:
    """The polynomial of :func:`smooth` (the paper's series) and its transpose, as functions of ``[rows, q]``.

    Other arguments: see :func:`smooth`, which also tells what is raised.
    """
    _check(T, alpha, "paper")
    return (
        lambda y: _horner(p.matvec, y, T, alpha, "paper"),
        lambda y: _horner(p.rmatvec, y, T, alpha, "paper"),
    )


def smoothed_products(p: GraphOperator, x: jax.Array, T: int, alpha: float) -> Smoothed:
    """Products with the smoothed attributes, which are not formed.  Arguments: see :func:`smooth`."""
    apply, apply_t = smooth_operator(p, T, alpha)
    return Smoothed(lambda g: apply(linalg.times(x, g)), lambda y: linalg.gram(x, apply_t(y)), x.shape, x.dtype)


def products_of(z: jax.Array) -> Smoothed:
    """Products with a matrix ``z [n, d]``."""
    return Smoothed(lambda g: linalg.times(z, g), lambda y: linalg.gram(z, y), z.shape, z.dtype)


def choose_path(n: int, d: int, m: int, k: int, T: int, tau: int) -> str:
    """Whether to form the smoothed attributes (``"explicit"``) or to apply them (``"implicit"``), by operations.

    Args:
      n: Nodes.
      d: Attributes.
      m: Entries of the propagation matrix.
      k: Clusters.
      T: Order of the polynomial.
      tau: Power iterations.
    """
    q = k + 10
    explicit = m * d * T + 2 * (tau + 1) * n * d * q
    return "explicit" if explicit < 2 * (tau + 1) * (n * d + m * T) * q else "implicit"


def _check(T, alpha, series):
    if series not in SERIES:
        raise ValueError(f"series: expected one of {', '.join(SERIES)}, got {series!r}")
    if T < 0:
        raise ValueError(f"T: expected 0 or more, got {T}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: expected more than 0, got {alpha}")


def _horner(matvec: Apply, x: jax.Array, T: int, alpha: float, series: str) -> jax.Array:
    shares, factor = _shares(T, alpha, series)

    def step(z, share):
        return (1 - share) * matvec(z) + share * x, None

    z = jax.lax.scan(step, x, jnp.asarray(shares, x.dtype))[0]
    return z if factor == 1 else z * jnp.asarray(factor, x.dtype)


def _shares(T: int, alpha: float, series: str) -> tuple[np.ndarray, float]:
    """The share of ``x`` in each step ``z <- (1 - share) P z + share x``, and the factor of the result.

    Steps of the plain recursions grow with ``alpha^t``; these are divided by the sums of their weights.
    """
    inverse, ratio = 1.0, 1.0  # 1 / S_t of the paper's sum of weights S_t, and that of the recursion divided by S_t
    shares = np.empty(T)
    for t in range(T):
        if series == "recursion":
            shares[t] = inverse / (ratio + inverse)
            ratio = alpha * (ratio + inverse) / (inverse + alpha)
        inverse = inverse / (inverse + alpha)
        if series == "paper":
            shares[t] = inverse
    if series == "paper":
        return shares, 1.0
    return shares, ratio * (T / inverse if alpha == 1 else 1.0)
