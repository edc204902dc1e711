"""Dictionary learning: K-SVD and the method of optimal directions."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix
from subspace_jax.linalg.products import gram, times
from subspace_jax.linalg.sparse_coding import code_error, densify, omp

SOLVERS = ("power", "svd", "mod")


class DictState(NamedTuple):
    """A dictionary and the codes of the columns that it was learnt from.

    Attributes:
      dictionary: ``[d1, k]``, atoms of unit norm.
      values: ``[s, d2]``, the coefficients of each column.
      indices: ``[s, d2]`` int32, its atoms, ascending.
      trace: ``[n_iter, 2]``, the Frobenius error after the sparse coding and after the update of each round; NaN for
        rounds that were not needed.
    """

    dictionary: jax.Array
    values: jax.Array
    indices: jax.Array
    trace: jax.Array


def ksvd_update(
    y: jax.Array, dictionary: jax.Array, s: jax.Array, n_power: int | Literal["svd"] = 8
) -> tuple[jax.Array, jax.Array]:
    """Updates the atoms one by one, each with its coefficients (K-SVD, Aharon, Elad and Bruckstein 2006).

    Atom ``i`` and row ``i`` of the coefficients become the best rank-one approximation of what the others leave of the
    columns that use it.  The error never increases, and the support stays.  A step reads the residual of these columns
    ``2 n_power`` times.

    Works under jit and vmap.

    Args:
      y: ``[d1, d2]``, float32 or float64.
      dictionary: ``[d1, k]``, atoms of unit norm.
      s: ``[k, d2]``, coefficients, whose zeros are outside the support.
      n_power: Power iterations from the current atom; "svd" takes the singular vectors, with the sign of that atom.

    Returns:
      The new dictionary and coefficients.

    Raises:
      ValueError: The shapes don't match, or ``n_power`` is below 1.
      TypeError: The dtype is neither float32 nor float64.
    """
    _check_codes(y, dictionary, s)
    if n_power != "svd" and n_power < 1:
        raise ValueError(f"n_power: expected at least 1 or 'svd', got {n_power}")
    rank_one = _rank_one_svd if n_power == "svd" else functools.partial(_rank_one_power, steps=n_power)

    def atom(i, carry):
        residual, dictionary, s = carry
        old, row = dictionary[:, i], s[i]
        used = (row != 0)[:, None]
        rest = jnp.where(used, residual + row[:, None] * old[None], 0)
        new, fitted = rank_one(rest, old)
        # An atom that no column uses, or that the others make needless, stays.
        there = jnp.any(fitted != 0)
        new, fitted = jnp.where(there, new, old), jnp.where(there & used[:, 0], fitted, row)
        residual = jnp.where(used, rest - fitted[:, None] * new[None], residual)
        return residual, dictionary.at[:, i].set(new), s.at[i].set(fitted)

    # Columns of y as rows.  Those that don't use an atom are masked: gathering the others costs as much as it saves,
    # and would move sharded columns.
    residual = (y - times(dictionary, s)).T
    _, dictionary, s = jax.lax.fori_loop(0, dictionary.shape[1], atom, (residual, dictionary, s))
    return dictionary, s


def _rank_one_power(rest: jax.Array, atom: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    full = jax.lax.Precision.HIGHEST

    def step(_, atom):
        return _unit(jnp.matmul(_unit(jnp.matmul(rest, atom, precision=full)), rest, precision=full))

    atom = jax.lax.fori_loop(0, steps, step, atom)
    return atom, jnp.matmul(rest, atom, precision=full)


def _rank_one_svd(rest: jax.Array, atom: jax.Array) -> tuple[jax.Array, jax.Array]:
    left, values, right = jnp.linalg.svd(rest, full_matrices=False)
    sign = jnp.where(jnp.vdot(right[0], atom) < 0, -1, 1).astype(rest.dtype)
    return sign * right[0], sign * values[0] * left[:, 0]


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x)
    return x / jnp.where(norm > 0, norm, 1)


def mod_update(y: jax.Array, dictionary: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Updates all atoms at once for given coefficients: the method of optimal directions (Engan, Aase and Husoy 1999).

    ``D = Y S^+``, from ``Y S^T`` and ``S S^T``, whose sums over sharded columns are all that is communicated.  Atoms
    are scaled to unit norm, their coefficients inversely.  An atom that vanishes stays as it was, with coefficients 0.

    Args:
      y: ``[d1, d2]``, float32 or float64.
      dictionary: ``[d1, k]``.
      s: ``[k, d2]``.

    Returns:
      The new dictionary and coefficients.

    Raises:
      ValueError: The shapes don't match.
      TypeError: The dtype is neither float32 nor float64.
    """
    _check_codes(y, dictionary, s)
    inverse = jnp.linalg.pinv(gram(s.T, s.T), hermitian=True)
    new = times(gram(y.T, s.T), inverse)
    norms = jnp.linalg.norm(new, axis=0, keepdims=True)
    there = norms > 100 * jnp.finfo(y.dtype).eps * jnp.max(norms)
    return jnp.where(there, new / jnp.where(there, norms, 1), dictionary), s * jnp.where(there, norms, 0).T


class DictOptions(NamedTuple):
    """Options of :func:`fit_dictionary`.

    Attributes:
      n_iter: Most rounds.
      solver: "power" and "svd" are those of :func:`ksvd_update`, "mod" is :func:`mod_update`.
      tol: Rounds end once the error after an update falls by less than this share of the previous one; 0 never ends.
      n_power: Power iterations of "power".
      pad: Whether random unit vectors may make up for missing first atoms; an error otherwise.
      tile: Columns at a time, see :func:`omp_gram`.
    """

    n_iter: int = 60
    solver: str = "power"
    tol: float = 0.0
    n_power: int = 8
    pad: bool = True
    tile: int = 8192


def fit_dictionary(
    y: jax.Array,
    k: int,
    sparsity: int,
    *,
    init: jax.Array | Literal["data", "svd"] = "data",
    key: jax.Array | None = None,
    **options: int | float | str,
) -> DictState:
    """Learns a dictionary by rounds of :func:`omp` and of an update of the atoms.

    Works under jit, and under vmap with all rounds of every problem.

    Args:
      y: ``[d1, d2]``, float32 or float64.
      k: Number of atoms.
      sparsity: Atoms of a column, ``s``.
      init: First atoms: "data" draws columns of ``y`` without replacement, scaled to unit norm; "svd" takes the left
        singular vectors; random unit vectors make up for missing ones.  Or an array ``[d1, k]``, scaled here.
      key: Key of the draws; ``jax.random.key(42)`` by default.
      **options: Fields of :class:`DictOptions`.

    Returns:
      The dictionary, and the codes of the columns of ``y``.

    Raises:
      ValueError: A size is out of range, a name is unknown, or ``init`` has another shape.
      TypeError: The dtype is neither float32 nor float64, or there is no such option.
    """
    check_matrix("y", y)
    n_iter, solver, tol, n_power, pad, tile = DictOptions(**options)
    if y.ndim != 2:
        raise ValueError(f"y: expected [d1, d2], got shape {y.shape}")
    if k < 1 or not 1 <= sparsity <= k:
        raise ValueError(f"k, sparsity: expected k >= sparsity >= 1, got {k} and {sparsity}")
    if n_iter < 1 or n_power < 1 or tol < 0:
        raise ValueError(f"n_iter, n_power, tol: expected at least 1, 1 and 0, got {n_iter}, {n_power} and {tol}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {SOLVERS}, got {solver!r}")
    start = first_atoms(jax.random.key(42) if key is None else key, y, k, init, pad=pad)
    power = "svd" if solver == "svd" else n_power

    def one_round(carry):
        number, dictionary, _, _, trace = carry
        values, indices = omp(dictionary, y, sparsity, tile=tile)
        order = jnp.argsort(indices, axis=0)
        values, indices = (jnp.take_along_axis(x, order, axis=0) for x in (values, indices))
        s = densify(values, indices, k)
        coded = code_error(dictionary, y, s)
        dictionary, s = mod_update(y, dictionary, s) if solver == "mod" else ksvd_update(y, dictionary, s, power)
        errors = jnp.stack([coded, code_error(dictionary, y, s)])
        return number + 1, dictionary, jnp.take_along_axis(s, indices, axis=0), indices, trace.at[number].set(errors)

    def more(carry):
        number, trace = carry[0], carry[-1]
        before, now = trace[number - 2, 1], trace[number - 1, 1]
        done = (number >= 2) & (before - now < tol * before) if tol else jnp.bool_(False)
        return (number < n_iter) & ~done

    count = y.shape[1]
    empty = (jnp.zeros((sparsity, count), y.dtype), jnp.zeros((sparsity, count), jnp.int32))
    carry = (jnp.int32(0), start, *empty, jnp.full((n_iter, 2), jnp.nan, y.dtype))
    return DictState(*jax.lax.while_loop(more, one_round, carry)[1:])


def first_atoms(
    key: jax.Array, y: jax.Array, k: int, init: jax.Array | Literal["data", "svd"] = "data", *, pad: bool = True
) -> jax.Array:
    """Returns the atoms ``[d1, k]`` that :func:`fit_dictionary` starts from; for the arguments see there."""
    d1, count = y.shape
    fill, draw = jax.random.split(key)
    random = jax.random.normal(fill, (d1, k), y.dtype)
    if not isinstance(init, str):
        if init.shape != (d1, k):
            raise ValueError(f"init: expected atoms {(d1, k)}, got shape {init.shape}")
        atoms = init.astype(y.dtype)
    elif init == "data":
        atoms = y[:, jax.random.permutation(draw, count)[:k]]
    elif init == "svd":
        atoms = jnp.linalg.svd(y, full_matrices=False)[0][:, :k]
    else:
        raise ValueError(f"init: expected 'data', 'svd' or an array, got {init!r}")
    if not pad and atoms.shape[1] < k:
        raise ValueError(f"k: {k} atoms from {atoms.shape[1]} vectors need pad=True, random vectors for the others")
    atoms = jnp.concatenate([atoms, random[:, atoms.shape[1] :]], axis=1)
    atoms = jnp.where(jnp.any(atoms != 0, axis=0, keepdims=True), atoms, random)
    return atoms / jnp.linalg.norm(atoms, axis=0, keepdims=True)


def _check_codes(y: jax.Array, dictionary: jax.Array, s: jax.Array) -> None:
    for name, x in (("y", y), ("dictionary", dictionary), ("s", s)):
        check_matrix(name, x)
    if not (y.ndim == 2 and dictionary.shape == (y.shape[0], s.shape[0]) and s.shape[1:] == y.shape[1:]):
        raise ValueError(
            f"y, dictionary, s: expected [d1, d2], [d1, k] and [k, d2], got {y.shape}, {dictionary.shape} and {s.shape}"
        )
