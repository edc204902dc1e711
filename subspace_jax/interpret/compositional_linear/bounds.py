"""What a representation needs for compositional generalisation: dimensions, reachable combinations, stable probes."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.compositional_linear.checks import check_weights
from subspace_jax.interpret.compositional_linear.probes import ConceptProbes
from subspace_jax.linalg import times

_MOST_COMBINATIONS = 4096
# A margin up to this is one of rounding: the region is empty, or has no interior.
_LEAST_MARGIN = 1e-9


class StabilityGap(NamedTuple):
    """How far probes that were fitted to different supports differ.

    Attributes:
      posterior: For each concept the largest total variation distance of two posteriors at any point, ``[concepts]``;
        0 for a stable representation.
      direction: For each concept the least absolute cosine between the weights of two probes, each less their mean over
        the values, ``[concepts]``; of two values that is the cosine between the normals of the decision boundaries.
    """

    posterior: jax.Array
    direction: jax.Array


def min_dimension(k: int) -> int:
    """The least width in which linear probes can be right on all combinations of ``k`` concepts: ``k``.

    Whatever the number of their values (arXiv 2602.24264, proposition 3).  In practice training reaches about ``k``
    with cross-entropy, ``2 k`` with binary cross-entropies, and one more on the unit sphere.

    Args:
      k: Number of concepts.

    Raises:
      ValueError: There are no concepts.
    """
    if k < 1:
        raise ValueError(f"k: expected 1 concept or more, got {k}")
    return k


def two_level_min_dimension(k: int, n: int) -> int:
    """The least width where logits take two values, one for the true value and one for others: ``1 + k (n - 1)``.

    Args:
      k: Number of concepts.
      n: Number of values of each.

    Raises:
      ValueError: There are no concepts, or fewer than two values.

    Source: arXiv 2602.24264, proposition 6.
    """
    if k < 1 or n < 2:
        raise ValueError(f"k, n: expected 1 concept or more of 2 values or more, got {k} and {n}")
    return 1 + k * (n - 1)


def check_divisibility(weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]) -> np.ndarray:
    """Finds which combinations of values linear probes can predict at all: whose decision region has an interior.

    A linear program for each combination, on the host: the largest margin, up to 1, by which the logits of its values
    lead anywhere.

    Args:
      weights: For each concept ``[values, d]``.
      biases: For each concept ``[values]``.

    Returns:
      ``[n_1, ..., n_k]`` bool, True where the combination is reachable; a representation is divisible where all are.

    Raises:
      ValueError: Shapes do not match, numbers are not finite, or there are more than 4,096 combinations.
    """
    from scipy.optimize import linprog

    weights = [np.asarray(w, np.float64) for w in weights]
    biases = [np.asarray(b, np.float64) for b in biases]
    check_weights(weights)
    if [b.shape for b in biases] != [w.shape[:1] for w in weights]:
        shapes = [list(b.shape) for b in biases]
        raise ValueError(f"biases: expected one number for each row of weights, got shapes {shapes}")
    if not all(np.isfinite(b).all() for b in biases):
        raise ValueError("biases: expected finite numbers, got NaN or infinity")
    sizes = tuple(len(w) for w in weights)
    if math.prod(sizes) > _MOST_COMBINATIONS:
        raise ValueError(f"weights: expected at most {_MOST_COMBINATIONS} combinations, got {math.prod(sizes)}")
    reachable = np.zeros(sizes, bool)
    for values in itertools.product(*map(range, sizes)):
        rows, bounds = [], []
        for w, b, c in zip(weights, biases, values, strict=True):
            others = np.arange(len(w)) != c
            # margin <= (w_c - w_j) z + b_c - b_j
            rows.append(np.c_[w[others] - w[c], np.ones(others.sum())])
            bounds.append(b[c] - b[others])
        variables = [(None, None)] * weights[0].shape[1] + [(None, 1.0)]
        found = linprog(np.r_[np.zeros(weights[0].shape[1]), -1.0], np.concatenate(rows), np.concatenate(bounds),
                        bounds=variables)  # fmt: skip
        reachable[values] = found.status == 0 and -found.fun > _LEAST_MARGIN
    return reachable


def stability_gap(probes: Sequence[ConceptProbes], x: jax.Array) -> StabilityGap:
    """Compares probes that were fitted to different supports of one representation.

    Stability of arXiv 2602.24264 asks that posteriors are the same whichever valid support was fitted to.

    Args:
      probes: Probes of the same concepts, two or more.
      x: Points to compare posteriors at, ``[points, d]``: all combinations, if possible.

    Returns:
      The gap.

    Raises:
      ValueError: There are fewer than two probes, or they are of different shapes.
    """
    shapes = {tuple(w.shape for w in own.weights) for own in probes}
    if len(probes) < 2 or len(shapes) > 1:
        raise ValueError(f"probes: expected 2 or more of the same shapes, got {len(probes)} of {sorted(shapes)}")
    if x.ndim != 2 or x.shape[1] != probes[0].weights[0].shape[1]:
        raise ValueError(f"x: expected points [points, {probes[0].weights[0].shape[1]}], got shape {list(x.shape)}")
    posterior, direction = [], []
    for i in range(len(probes[0].weights)):
        of_concept = [ConceptProbes((own.weights[i],), (own.biases[i],)) for own in probes]
        gaps = _gaps(jax.tree.map(lambda *parts: np.stack(parts), *of_concept), x)
        posterior.append(gaps[0])
        direction.append(gaps[1])
    return StabilityGap(jnp.stack(posterior), jnp.stack(direction))


@jax.jit
def _gaps(probes: ConceptProbes, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest total variation distance of posteriors, and least cosine of weights, of stacked probes of a concept."""
    posteriors = jax.nn.softmax(jax.vmap(lambda own: own.logits(x)[0])(probes), axis=2)
    (weights,) = probes.weights
    weights = (weights - jnp.mean(weights, axis=1, keepdims=True)).reshape(len(weights), -1)

    def farthest(own):
        return 0.5 * jnp.max(jnp.sum(jnp.abs(posteriors - own[None]), axis=2))

    unit = weights / jnp.linalg.norm(weights, axis=1, keepdims=True)
    return jnp.max(jax.lax.map(farthest, posteriors)), jnp.min(jnp.abs(times(unit, unit.T)))
