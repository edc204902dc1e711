"""Shared by the manifolds: checks, working precision, and functions of orthonormal matrices."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import linalg
from subspace_jax.linalg import broadcast_leading, gram, spectral, times
from subspace_jax.manifolds._long_steps import by_length, polar_factor, q_factor

RETRACTIONS = ("exp", "qr", "polar", "cayley")

orthonormality_error = linalg.orthonormality_error


def random_point(
    key: jax.Array, n: int, k: int, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws points uniformly; see :func:`subspace_jax.linalg.random_orthonormal`.

    Args:
      key: Random key.
      n: Dimension of the space.
      k: Number of columns, at most ``n``.
      batch_shape: Leading axes.
      dtype: float32 or float64.

    Returns:
      ``[*batch_shape, n, k]``.

    Raises:
      ValueError: ``k`` is below 1 or above ``n``.
      TypeError: ``dtype`` is neither float32 nor float64.
    """
    return linalg.random_orthonormal(key, n, k, batch_shape, dtype)


def reorthonormalize(s: jax.Array, method: str = "qr") -> jax.Array:
    """Removes the drift of a nearly orthonormal matrix, moving it by no more than the drift.

    Args:
      s: ``[..., n, k]``, float32 or float64, with ``||S^T S - I||`` below about 0.1.
      method: "qr" keeps the flag of leading columns (QR with positive diagonal, by Cholesky); "polar" takes one Newton
        step towards the nearest orthonormal matrix, which squares the error.

    Returns:
      The orthonormal matrix, with the same column space.

    Raises:
      ValueError: ``method`` is unknown, or ``s`` is wider than tall.
      TypeError: ``s`` is neither float32 nor float64.
    """
    (s,), _ = working({"s": s})
    if method == "qr":
        return linalg.cholesky_qr(s)[0]
    if method == "polar":
        return linalg.polar_step(s)
    raise ValueError(f"method: expected 'qr' or 'polar', got {method!r}")


def check_retraction(method: str) -> None:
    """Raises ValueError unless ``method`` is a retraction."""
    if method not in RETRACTIONS:
        raise ValueError(f"method: expected one of {RETRACTIONS}, got {method!r}")


@functools.partial(jax.jit, inline=True)
def qr_retraction(s: jax.Array, h: jax.Array) -> jax.Array:
    """Returns the Q factor of ``S + H``; its Gram matrix ``I + H^T H`` is well conditioned for short steps."""
    return by_length(lambda x: linalg.cholesky_qr2(x)[0], lambda x: linalg.polar_step(q_factor(x)[0]), h, s + h)


@functools.partial(jax.jit, inline=True)
def polar_retraction(s: jax.Array, h: jax.Array) -> jax.Array:
    """Returns ``(S + H) (I + H^T H)^{-1/2}``, the orthonormal matrix nearest to ``S + H``."""

    def less_one(x):
        root = jnp.sqrt(1 + x)
        return (-x / (root + root * root),)

    def short(s, h):
        (c,) = spectral(less_one, gram(h, h))
        return s + (h + times(s + h, c))

    return by_length(short, lambda s, h: polar_factor(s + h), h, s, h)


def working(
    points: Mapping[str, jax.Array], vectors: Mapping[str, jax.Array] | None = None
) -> tuple[list[jax.Array], Callable[[jax.Array], jax.Array]]:
    """Checks arguments, and converts them to a common working dtype and common leading axes.

    Args:
      points: Orthonormal matrices by name, float32 or float64.
      vectors: Further matrices by name, of any floating-point dtype.

    Returns:
      All arrays in order, and a function that casts to the dtype of the first.

    Raises:
      ValueError: Shapes do not match.
      TypeError: A dtype is not allowed.
    """
    vectors = {} if vectors is None else vectors
    named = {name: jnp.asarray(x) for name, x in {**points, **vectors}.items()}
    shapes = {name: x.shape for name, x in named.items()}
    first = next(iter(named.values()))
    for name, x in named.items():
        if name in points and x.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(f"{name}: points stay orthonormal in float32 or float64, got {x.dtype}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating-point matrix, got {x.dtype}")
        if x.ndim < 2 or not 1 <= x.shape[-1] <= x.shape[-2] or x.shape[-2:] != first.shape[-2:]:
            raise ValueError(f"{name}: expected matrices [..., n, k] of one shape with 1 <= k <= n, got {shapes}")
    dtype, out = linalg.working_dtype(*named.values()), first.dtype
    return broadcast_leading(*(x.astype(dtype) for x in named.values())), lambda x: x.astype(out)


def is_coarse(h: jax.Array) -> bool:
    """Whether the dtype of a vector is too coarse for it to be tangent in float32."""
    return jnp.finfo(jnp.asarray(h).dtype).bits < 32


def at_time(t: ArrayLike, *arrays: jax.Array) -> list[jax.Array]:
    """Multiplies the last array by times that broadcast over leading axes, and broadcasts the others to match."""
    *others, h = arrays
    t = jnp.asarray(t).astype(h.dtype)
    if t.ndim == 0:
        return [*others, t * h]
    *others, h, t = broadcast_leading(*others, h, t[..., None, None])
    return [*others, t * h]


def rounding(s: jax.Array) -> float:
    """Returns the distance below which two points are equal in the precision of ``s``."""
    return 4 * s.shape[-1] * float(jnp.finfo(s.dtype).eps)
