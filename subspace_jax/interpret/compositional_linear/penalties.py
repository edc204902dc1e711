"""Losses that make a representation compositional: differentiable forms of the scores."""

import jax
import jax.numpy as jnp

from subspace_jax.interpret.compositional_linear.checks import check_examples
from subspace_jax.interpret.compositional_linear.core import Factors, centred, factors_of, reconstruct
from subspace_jax.interpret.compositional_linear.structure import vectors_of
from subspace_jax.linalg import times

_SMALL = 1e-9


def factorization_loss(x: jax.Array, labels: jax.Array, n_values: tuple[int, ...]) -> jax.Array:
    """Share of the variance that no sum of one vector per concept value explains: ``1 - R^2``, not whitened.

    Args:
      x: Embeddings of a batch, ``[examples, d]``.  The loss needs the whole batch: it is no mean over examples.
      labels: ``[examples, concepts]`` integers.
      n_values: Number of values of each concept, static.

    Returns:
      A scalar, 0 where embeddings are additive; differentiable.

    Raises:
      ValueError: As :func:`concept_factors`.
      TypeError: As :func:`concept_factors`.
    """
    check_examples(x, labels, n_values)
    x = centred(x)
    residual = x - reconstruct(factors_of(x, labels, tuple(n_values), "means"), labels)
    return jnp.sum(jnp.square(residual)) / (jnp.sum(jnp.square(x)) + _SMALL)


def orthogonality_loss(factors: Factors, kind: str = "difference") -> jax.Array:
    """Mean squared cosine between the vectors of different concepts; 0 where concepts are orthogonal.

    The square has a gradient at 0, unlike the absolute value that :func:`factor_cosines` measures.

    Args:
      factors: The factors, of two concepts or more, as from :func:`concept_factors` of a batch.
      kind: "difference", of which the theorem of arXiv 2602.24264 speaks, or "factor".

    Returns:
      A scalar; differentiable.  0 too where no two concepts have vectors to compare.

    Raises:
      ValueError: There are fewer than two concepts, or the kind is unknown.
    """
    if len(factors.means) < 2:
        raise ValueError(f"factors: expected those of 2 concepts or more, got {len(factors.means)}")
    if kind not in ("factor", "difference"):
        raise ValueError(f"kind: expected 'factor' or 'difference', got {kind!r}")
    vectors, total, pairs = vectors_of(factors, kind), [], []
    for i, (one, active) in enumerate(vectors):
        for two, others in vectors[i + 1 :]:
            # The sum of squared inner products of two sets, without a matrix of all pairs.
            smaller, larger = times(one.T, one), times(two.T, two)
            total.append(jnp.sum(smaller * larger))
            pairs.append(jnp.sum(active).astype(one.dtype) * jnp.sum(others).astype(one.dtype))
    return sum(total) / jnp.maximum(sum(pairs), 1)
