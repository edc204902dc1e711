"""The FactorVAE score: which dimension of a code varies least where a factor is held fixed (arXiv 1802.05983)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype
from subspace_jax.metrics.disentanglement import check_codes, check_factors

_VOTES_AT_A_TIME = 64


class FactorVAEScore(NamedTuple):
    """What :func:`factor_vae_score` finds.

    Attributes:
      score: Accuracy of the majority classifier on the second set of votes.
      accuracy: Its accuracy on the first, to which it is fitted.
      votes: Counts of the first set, int32 ``[factors, dims]``.
    """

    score: jax.Array
    accuracy: jax.Array
    votes: jax.Array


def factor_vae_votes(codes: jax.Array, batch_idx: jax.Array) -> jax.Array:
    """The dimension whose variance in a batch of examples is least, relative to that over all examples.

    A constant dimension never wins.  Of codes that are not standardized, disentanglement_lib leaves out dimensions with
    a standard deviation below 0.05.

    Args:
      codes: ``[examples, dims]``.
      batch_idx: Indices of examples, ``[votes, batch]``.

    Returns:
      Dimensions, ``[votes]`` int32.

    Raises:
      ValueError: A shape is wrong, codes are not finite, or a batch has fewer than two examples.
    """
    check_codes("codes", codes)
    if batch_idx.ndim != 2 or batch_idx.shape[1] < 2:
        raise ValueError(f"batch_idx: expected [votes, at least 2 examples], got shape {batch_idx.shape}")
    return _votes(codes, batch_idx)


@jax.jit
def _votes(codes, batch_idx):
    codes = codes.astype(working_dtype(codes))
    spread = jnp.var(codes, axis=0)
    varies = spread > 0
    scale = jnp.where(varies, spread, 1)

    def vote(indices):
        return jnp.argmin(jnp.where(varies, jnp.var(codes[indices], axis=0) / scale, jnp.inf)).astype(jnp.int32)

    return jax.lax.map(vote, batch_idx, batch_size=_VOTES_AT_A_TIME)


@functools.partial(jax.jit, static_argnames="shape")
def factor_vae_from_votes(
    dims: tuple[jax.Array, jax.Array], factors: tuple[jax.Array, jax.Array], shape: tuple[int, int]
) -> FactorVAEScore:
    """Fits a majority vote from dimensions to factors, and tests it on other votes.

    Args:
      dims: Winning dimensions of the votes to fit to, and of those to test on: ``[votes]`` integers each.
      factors: The factor that was held fixed in each of them, likewise.
      shape: Number of factors and of dimensions.

    Returns:
      The score.  Ties, and dimensions without a vote, go to the first factor.
    """
    fitted, tested = (jnp.zeros(shape, jnp.int32).at[k, d].add(1) for k, d in zip(factors, dims, strict=True))
    majority = jnp.argmax(fitted, axis=0)

    def accuracy(votes):
        return jnp.sum(votes[majority, jnp.arange(shape[1])]) / jnp.sum(votes)

    return FactorVAEScore(accuracy(tested), accuracy(fitted), fitted)


def factor_vae_score(
    key: jax.Array,
    codes_val: jax.Array,
    y_val: jax.Array,
    codes_test: jax.Array,
    y_test: jax.Array,
    *,
    num_votes: int = 10_000,
    batch_size: int = 64,
) -> FactorVAEScore:
    """The FactorVAE score (Kim and Mnih, arXiv 1802.05983, section 4) over examples that are given.

    For each vote a factor is drawn, one of its values, and examples with this value: without replacement, or with it
    where there are too few.

    Args:
      key: Random key.
      codes_val: Codes from whose votes the classifier is made, ``[examples, dims]``.
      y_val: Their factors ``[examples, factors]``, integers.
      codes_test: Codes on whose votes it is scored.
      y_test: Their factors.
      num_votes: Votes of each set.
      batch_size: Examples of a vote.

    Returns:
      The score.

    Raises:
      ValueError: Shapes do not match, codes are not finite, or a number is too small.
    """
    if num_votes < 1:
        raise ValueError(f"num_votes: expected at least 1, got {num_votes}")
    if codes_test.shape[1:] != codes_val.shape[1:] or y_test.shape[1:] != y_val.shape[1:]:
        raise ValueError(
            f"codes_test, y_test: expected as many dimensions and factors as of codes_val {codes_val.shape} and y_val "
            f"{y_val.shape}, got {codes_test.shape} and {y_test.shape}"
        )
    dims, fixed = [], []
    sets = (("val", codes_val, y_val), ("test", codes_test, y_test))
    for own, (name, codes, factors) in zip(jax.random.split(key), sets, strict=True):
        check_codes(f"codes_{name}", codes)
        check_factors(f"y_{name}", factors, codes.shape[0])
        rows, factor = _fixed_factor_batches(own, factors, num_votes=num_votes, batch_size=batch_size)
        dims.append(factor_vae_votes(codes, rows))
        fixed.append(factor)
    return factor_vae_from_votes(tuple(dims), tuple(fixed), (y_val.shape[1], codes_val.shape[1]))


@functools.partial(jax.jit, static_argnames=("num_votes", "batch_size"))
def _fixed_factor_batches(
    key: jax.Array, factors: jax.Array, *, num_votes: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Draws batches of examples that share the value of one factor.

    Args:
      key: Random key.
      factors: ``[examples, factors]`` integers.
      num_votes: Number of batches.
      batch_size: Examples in a batch.

    Returns:
      Indices ``[num_votes, batch_size]`` and the factors that are fixed ``[num_votes]``, both int32.
    """
    num_examples, num_factors = factors.shape
    of_factor, of_value, of_rows = jax.random.split(key, 3)
    order = jnp.argsort(factors, axis=0).T
    values = jnp.take_along_axis(factors.T, order, axis=1)
    new = jnp.concatenate([jnp.ones((num_factors, 1), bool), values[:, 1:] != values[:, :-1]], axis=1)
    # Where each value begins in the order, then the end of the order.
    starts = jnp.sort(jnp.where(new, jnp.arange(num_examples), num_examples), axis=1)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=num_examples)

    fixed = jax.random.randint(of_factor, (num_votes,), 0, num_factors)
    group = jax.random.randint(of_value, (num_votes,), 0, jnp.sum(new, axis=1)[fixed])
    first = starts[fixed, group]
    count = starts[fixed, group + 1] - first
    few = count < batch_size

    def draw(chosen, step):
        # Floyd's subsets: a number up to ``last``, and ``last`` itself where that number is taken.
        i, uniform = step
        last = jnp.where(few, count - 1, count - batch_size + i)
        number = jnp.minimum((uniform * (last + 1).astype(uniform.dtype)).astype(last.dtype), last)
        taken = jnp.any(chosen == number[:, None], axis=1) & ~few
        return chosen.at[:, i].set(jnp.where(taken, last, number)), None

    uniforms = jax.random.uniform(of_rows, (batch_size, num_votes))
    nothing = jnp.full((num_votes, batch_size), -1, count.dtype)
    chosen, _ = jax.lax.scan(draw, nothing, (jnp.arange(batch_size), uniforms))
    return order[fixed[:, None], first[:, None] + chosen].astype(jnp.int32), fixed.astype(jnp.int32)
