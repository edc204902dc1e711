"""Scores of sets that are too large to be held: two passes over blocks, and sums that any score follows from."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.compositional_linear.checks import check_examples, check_method
from subspace_jax.interpret.compositional_linear.core import (
    FactorizationScore,
    Factors,
    pair_counts,
    reconstruct,
    solved,
)
from subspace_jax.linalg import gram, working_dtype

Blocks = Callable[[], Iterable[tuple[jax.Array, jax.Array]]]


class Decomposition(NamedTuple):
    """Embeddings as mean, factors and residual, by their sums.

    Attributes:
      examples: Number of examples.
      mean: Mean of the embeddings, ``[d]`` float64.
      factors: Factors of the centred embeddings.
      total: Sum of the outer products of the centred embeddings, ``[d, d]`` float64.
      residual: The same of what the factors leave, ``[d, d]`` float64.
    """

    examples: int
    mean: np.ndarray
    factors: Factors
    total: np.ndarray
    residual: np.ndarray


def decompose(blocks: Blocks, n_values: tuple[int, ...], method: str = "means") -> Decomposition:
    """Factors and scatters of a set of any size, in two passes and in the memory of one block and ``[d, d]``.

    The examples of a block may be sharded over devices.  Sums of blocks are added in float64 on the host.

    Args:
      blocks: Called for each pass: gives embeddings ``[examples, d]`` and labels ``[examples, concepts]``, block by
        block, the same ones each time.  Blocks of one size compile once.
      n_values: Number of values of each concept.
      method: See :func:`concept_factors`.

    Returns:
      The decomposition, for :func:`decomposition_r2`.

    Raises:
      ValueError: As :func:`concept_factors`, or the passes differ.
      TypeError: As :func:`concept_factors`.
    """
    check_method(method)
    n_values, sums, shift = tuple(n_values), None, None
    for x, labels in blocks():
        check_examples(x, labels, n_values, least=1)
        if shift is None:  # near the mean: sums of float32 would lose what is small beside a large one
            shift = jnp.mean(x.astype(working_dtype(x)), axis=0)
        sums = _added(sums, _sums(x, labels, shift, n_values, method))
    if sums is None or sums["count"] < 2:
        raise ValueError(f"blocks: expected 2 examples or more, got {0 if sums is None else int(sums['count'])}")
    count = int(sums["count"])
    offset = np.sum(sums["sums"][0], axis=0) / count
    means = tuple(s - c[:, None] * offset[None] for s, c in zip(sums["sums"], sums["counts"], strict=True))
    counts = tuple(jnp.asarray(c, jnp.int32) for c in sums["counts"])
    mean = np.asarray(shift, np.float64) + offset
    as_given = partial(jnp.asarray, dtype=shift.dtype)
    pairs = jnp.asarray(sums["pairs"], jnp.int32) if method == "lstsq" else None
    factors = solved(tuple(map(as_given, means)), counts, pairs)
    found = None
    for x, labels in blocks():
        found = _added(found, _scatters(x, labels, as_given(mean), factors))
    if found is None or found["count"] != count:
        seen = 0 if found is None else int(found["count"])
        raise ValueError(f"blocks: expected the {count} examples of the first pass in the second, got {seen}")
    return Decomposition(count, mean, factors, found["total"], found["residual"])


def decomposition_r2(
    found: Decomposition, whiten: bool = True, projector: jax.Array | None = None, rcond: float = 1e-6
) -> FactorizationScore:
    """:func:`linear_factorization_r2` of a decomposition, in float64 on the host.

    Args:
      found: The decomposition.
      whiten: Other arguments: see :func:`linear_factorization_r2`.
      projector: See there.
      rcond: See there.

    Returns:
      The score.

    Raises:
      ValueError: The projector does not fit, or the embeddings are all the same.
    """
    total, residual = found.total, found.residual
    if projector is not None:
        basis = np.asarray(projector, np.float64)
        if basis.ndim != 2 or basis.shape[0] != len(total):
            raise ValueError(f"projector: expected [{len(total)}, r], got shape {list(basis.shape)}")
        total, residual = basis.T @ total @ basis, basis.T @ residual @ basis
    rounding = 16 * jnp.finfo(found.factors.means[0].dtype).eps * np.linalg.norm(found.mean)
    if not np.trace(total) > found.examples * rounding**2:
        raise ValueError(f"x: expected embeddings that differ, got the same one in all {found.examples} examples")
    if whiten:
        variances, directions = np.linalg.eigh(total / (found.examples - 1))
        kept = variances > rcond * variances[-1]
        white = directions[:, kept] / np.sqrt(variances[kept])[None]
        total, residual = white.T @ total @ white, white.T @ residual @ white
    sse, sst = np.trace(residual), np.trace(total)
    return FactorizationScore(1 - sse / sst, sse, sst)


def array_blocks(x: np.ndarray, labels: np.ndarray, rows: int = 4096) -> Blocks:
    """Blocks of arrays in the memory of the host, for :func:`decompose`."""

    def blocks():
        for start in range(0, len(x), rows):
            yield jnp.asarray(x[start : start + rows]), jnp.asarray(labels[start : start + rows])

    return blocks


@partial(jax.jit, static_argnums=(3, 4))
def _sums(x, labels, shift, n_values, method):
    x = x.astype(shift.dtype) - shift[None]
    ones = jnp.ones(len(x), jnp.int32)
    found = {
        "count": len(x) * jnp.ones((), jnp.int32),
        "sums": tuple(jax.ops.segment_sum(x, labels[:, i], n) for i, n in enumerate(n_values)),
        "counts": tuple(jax.ops.segment_sum(ones, labels[:, i], n) for i, n in enumerate(n_values)),
    }
    return found | ({"pairs": pair_counts(labels, n_values)} if method == "lstsq" else {})


@jax.jit
def _scatters(x, labels, mean, factors):
    x = x.astype(mean.dtype) - mean[None]
    residual = x - reconstruct(factors, labels)
    return {"count": len(x) * jnp.ones((), jnp.int32), "total": gram(x, x), "residual": gram(residual, residual)}


def _added(sums, block):
    """Adds the sums of a block to those before, in float64."""
    block = jax.tree.map(lambda value: np.asarray(value, np.float64), block)
    return block if sums is None else jax.tree.map(np.add, sums, block)
