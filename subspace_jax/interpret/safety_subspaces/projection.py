"""Updates of weights, projected on the leading directions of another update (arXiv 2505.14185)."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg

Method = Literal["same", "orth", "opp"]
Basis = Literal["top", "random", "random_k"]
Side = Literal["output", "input"]


class RankBasis(NamedTuple):
    """Leading directions ``q [d, k]`` of an update, and their number ``k``, a Python integer."""

    q: jax.Array
    k: int


class UpdateModes(NamedTuple):
    """An update in the directions of another one.

    Attributes:
      q: The directions ``[d, r]``, orthonormal; those of no energy are zero.
      coefficients: ``q^T u``, ``[r, n]``.
      energies: Squared norms of the first 1, 2, ..., r rows of these together, ``[r]``.
    """

    q: jax.Array
    coefficients: jax.Array
    energies: jax.Array


def rank_fraction_basis(v: jax.Array, frac: float, side: Side = "output") -> RankBasis:
    """The leading singular vectors of an update, a fraction of all that it has.

    ``k = max(1, round(frac * min(in, out)))``, where halves are rounded to even.

    Args:
      v: Update of a kernel ``[in, out]``, floating point; of other shapes the whole is one direction.
      frac: In (0, 1].
      side: Whose space the vectors are of: that of outputs, ``d = out``, or of inputs, ``d = in``.

    Returns:
      The basis, float32 or wider.  Columns beyond the numerical rank of ``v`` are zero.

    Raises:
      ValueError: ``frac`` or ``side`` is none of these, or ``v`` is empty or, where its values are known, not finite.
      TypeError: ``v`` is not floating point.
    """
    check_update("v", v)
    q = directions(columns(v, check_choice("side", side, Side)))
    k = num_directions(frac, q.shape[1])
    return RankBasis(q[:, :k], k)


def project_update(
    u: jax.Array,
    v: jax.Array,
    frac: float,
    method: Method,
    basis: Basis = "top",
    key: jax.Array | None = None,
    side: Side = "output",
) -> jax.Array:
    """Projects an update on the leading directions ``L`` of another one, or away from them.

    On the side of outputs, for kernels ``[in, out]``: ``u L L^T`` for method "same", ``u - u L L^T`` for "orth" and
    ``-u L L^T`` for "opp".  Of other shapes the direction is ``v`` itself, whatever ``frac``: ``v <u, v> / <v, v>``, 0
    where ``v`` is.

    Args:
      u: Update ``[in, out]``, floating point.
      v: The other one, of the same shape.
      frac: See :func:`rank_fraction_basis`.
      method: Which part is returned.
      basis: "top"; or a control: "random", where Gaussian values replace ``v``, or "random_k", where directions of
        ``v`` are drawn instead of the leading ones.
      key: Key of the controls.
      side: See :func:`rank_fraction_basis`.

    Returns:
      The part, float32 or wider.

    Raises:
      ValueError: Shapes differ, ``key`` is missing, or see :func:`rank_fraction_basis`.
      TypeError: An update is not floating point.
    """
    check_update("u", u)
    check_update("v", v)
    if u.shape != v.shape:
        raise ValueError(f"u, v: expected updates of one shape, got {u.shape} and {v.shape}")
    check_choice("method", method, Method)
    check_choice("side", side, Side)
    q = directions(columns(v, side), basis, key)
    k = num_directions(frac, q.shape[1])
    target = columns(u, side)
    coefficients = linalg.gram(q[:, :k], target)
    return from_columns(part(target, q[:, :k], coefficients, method), u.shape, side)


def update_modes(u: jax.Array, q: jax.Array) -> UpdateModes:
    """Writes an update in given directions, for projections of all fractions at once.

    Args:
      u: The update as :func:`columns`, ``[d, n]``.
      q: :func:`directions`, ``[d, r]``.
    """
    coefficients = linalg.gram(q, u)
    return UpdateModes(q, coefficients, jnp.cumsum(jnp.sum(jnp.square(coefficients), axis=1)))


def directions(v: jax.Array, basis: Basis = "top", key: jax.Array | None = None) -> jax.Array:
    """Directions of an update, the most important first.

    Args:
      v: The update as :func:`columns`, ``[d, n]``.
      basis: See :func:`project_update`.
      key: Key of the controls.

    Returns:
      ``[d, min(d, n)]``, orthonormal, zero beyond the numerical rank.  The drawn ones are in random order, those that
      are zero behind.

    Raises:
      ValueError: ``basis`` is unknown, or a control has no key.
    """
    check_choice("basis", basis, Basis)
    if basis != "top" and key is None:
        raise ValueError(f"key: expected a random key for the basis {basis!r}, got None")
    if basis == "random":
        v = jax.random.normal(key, v.shape, v.dtype)
    q, s, _ = linalg.canonical_svd(v)
    there = s > s[0] * max(v.shape) * jnp.finfo(s.dtype).eps
    q = jnp.where(there[None], q, 0)
    if basis == "random_k":
        q = q[:, jnp.argsort(jax.random.uniform(key, s.shape) + jnp.where(there, 0, 2))]
    return q


def part(u: jax.Array, q: jax.Array, coefficients: jax.Array, method: Method) -> jax.Array:
    """The part ``q coefficients`` of ``u [d, n]``, its opposite, or the rest; ``coefficients`` are ``q^T u``."""
    parallel = linalg.times(q, coefficients)
    return {"same": parallel, "opp": -parallel}[method] if method != "orth" else u - parallel


def columns(x: jax.Array, side: Side) -> jax.Array:
    """An update as a matrix ``[d, n]`` whose columns are of the side's space; one column where it is no matrix."""
    x = x.astype(linalg.working_dtype(x))
    if x.ndim != 2:
        return x.reshape(-1, 1)
    return x.T if side == "output" else x


def from_columns(m: jax.Array, shape: tuple[int, ...], side: Side) -> jax.Array:
    """The update of a shape whose :func:`columns` are ``m``."""
    return m.T if side == "output" and len(shape) == 2 else m.reshape(shape)


def num_directions(frac: float, available: int) -> int:
    """Number of directions that a fraction stands for.

    Raises:
      ValueError: ``frac`` is not in (0, 1].
    """
    if not 0 < frac <= 1:
        raise ValueError(f"frac: expected a fraction in (0, 1], got {frac}")
    return max(1, round(frac * available))


def check_choice(name: str, value: str, choices) -> str:
    """Returns the value if it is one of the literals; raises ValueError otherwise."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {get_args(choices)}, got {value!r}")
    return value


def check_update(name: str, x: jax.Array) -> None:
    """Raises unless an update is floating point, not empty and, where its values are known, finite."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {x.dtype}")
    if x.size == 0:
        raise ValueError(f"{name}: expected an update with entries, got shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True):
        # On the host: what is known in a traced function would be traced, too.
        bad = int(np.sum(~np.isfinite(np.asarray(x))))
        if bad:
            raise ValueError(f"{name}: expected finite numbers, got {bad} that are not, in shape {x.shape}")
