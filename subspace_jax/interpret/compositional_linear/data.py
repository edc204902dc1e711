"""Full grids of concepts: exact embeddings, small pictures, transformed digits, and random features of them."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import data, linalg

SHAPES, RADII, POSITIONS = ("square", "disc", "diamond"), (2, 3, 4), 5
_SIDE, _FIRST, _STEP = 20, 4, 3


class ConceptGrid(NamedTuple):
    """Examples of all combinations of concept values.

    Attributes:
      x: Embeddings or flattened pictures, ``[examples, d]``.
      labels: ``[examples, concepts]`` int32.
      n_values: Number of values of each concept.
      names: Names of the concepts.
    """

    x: jax.Array
    labels: jax.Array
    n_values: tuple[int, ...]
    names: tuple[str, ...]


def orthogonal_factor_embedding(
    key: jax.Array, n_values: Sequence[int], d: int, ranks: Sequence[int] | None = None, noise: float = 0.0
) -> ConceptGrid:
    """Embeds a full grid exactly as compositional generalisation needs: additive, concepts in orthogonal subspaces.

    Args:
      key: Random key.
      n_values: Number of values of each concept.
      d: Width.
      ranks: Dimension of each concept's subspace; ``n - 1`` by default, so that every value is linearly readable.
      noise: Standard deviation of Gaussian noise in each coordinate.

    Returns:
      The grid, each combination once, the last concept varying fastest; float32, or float64 where 64-bit types are
      enabled.  The vectors of a concept have a mean of 0 over its values: they are a regular simplex with edges of
      length ``sqrt(2)``, or a random projection of one to a lower rank.

    Raises:
      ValueError: There are fewer than two values of a concept, a rank is below 1 or above ``n - 1``, which vectors with
        a mean of 0 span, or the subspaces do not fit into ``d``.
    """
    n_values = tuple(map(int, n_values))
    ranks = tuple(n - 1 for n in n_values) if ranks is None else tuple(ranks)
    if not n_values or min(n_values) < 2:
        raise ValueError(f"n_values: expected 2 or more for each concept, got {n_values}")
    if len(ranks) != len(n_values) or any(not 1 <= r < n for r, n in zip(ranks, n_values, strict=False)):
        raise ValueError(f"ranks: expected 1 to n - 1 for concepts of {n_values} values, got {ranks}")
    if sum(ranks) > d:
        raise ValueError(f"d: expected at least the sum of the ranks, {sum(ranks)}, got {d}")
    x = _embedded(key, noise, n_values, d, ranks, jnp.zeros(()).dtype)
    labels = jnp.asarray(full_grid(n_values))
    return ConceptGrid(x, labels, n_values, tuple(f"concept {i}" for i in range(len(n_values))))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _embedded(key, noise, n_values, d, ranks, dtype):
    of_basis, of_factors, of_noise = jax.random.split(key, 3)
    basis = linalg.random_orthonormal(of_basis, d, sum(ranks), dtype=dtype)
    labels = full_grid(n_values)
    x = jnp.asarray(noise, dtype) * jax.random.normal(of_noise, (len(labels), d), dtype)
    start = 0
    for i, (n, rank) in enumerate(zip(n_values, ranks, strict=True)):
        codes = jax.random.normal(jax.random.fold_in(of_factors, i), (n, rank), dtype)
        codes = linalg.positive_qr(codes - jnp.mean(codes, axis=0, keepdims=True))[0]
        x = x + linalg.times(codes, basis[:, start : start + rank].T)[labels[:, i]]
        start += rank
    return x


def full_grid(n_values: Sequence[int]) -> np.ndarray:
    """Labels of all combinations, ``[prod n_values, concepts]`` int32, the last concept varying fastest."""
    return np.asarray(list(itertools.product(*map(range, n_values))), np.int32)


def shape_pictures() -> ConceptGrid:
    """Draws 225 pictures in the manner of dSprites: shape x radius x vertical position x horizontal position.

    20 x 20 pixels, 0 or 1; a square, a disc and a diamond; radii 2, 3 and 4; centres at 4, 7, 10, 13 and 16.

    Returns:
      ``x [225, 400]`` float32, and labels ``[225, 4]``.
    """
    n_values = (len(SHAPES), len(RADII), POSITIONS, POSITIONS)
    labels = full_grid(n_values)
    rows, columns = np.mgrid[:_SIDE, :_SIDE]
    pictures = np.empty((len(labels), _SIDE, _SIDE), np.float32)
    for picture, (shape, radius, top, left) in zip(pictures, labels, strict=True):
        down, right = abs(rows - _FIRST - _STEP * top), abs(columns - _FIRST - _STEP * left)
        r = RADII[radius]
        inside = (np.maximum(down, right) <= r, down**2 + right**2 <= (r + 0.5) ** 2, down + right <= r)
        picture[:] = inside[shape]
    names = ("shape", "radius", "vertical", "horizontal")
    return ConceptGrid(jnp.asarray(pictures.reshape(len(labels), -1)), jnp.asarray(labels), n_values, names)


def transformed_digits(per_digit: int = 20) -> ConceptGrid:
    """Digits of scikit-learn, each rotated by 0, 90, 180 and 270 degrees and with inverted grey values: a full grid.

    Args:
      per_digit: Pictures of each digit; each gives eight examples.

    Returns:
      ``x [80 per_digit, 64]`` float32 in [0, 1], and labels ``[80 per_digit, 3]``: digit, rotation, inversion.

    Raises:
      ValueError: ``per_digit`` is below 1 or above 100.
    """
    if not 1 <= per_digit <= 100:
        raise ValueError(f"per_digit: expected 1 to 100, got {per_digit}")
    found = data.load_arrays(data.image_source("digits", "train"))
    pictures = np.asarray(found["inputs"], np.float32).reshape(-1, 8, 8)
    pictures = pictures / pictures.max()
    chosen = np.concatenate([np.flatnonzero(found["labels"] == digit)[:per_digit] for digit in range(10)])
    x, labels = [], []
    for turns, inverted in itertools.product(range(4), range(2)):
        rotated = np.rot90(pictures[chosen], turns, axes=(1, 2)).reshape(len(chosen), -1)
        x.append(1 - rotated if inverted else rotated)
        labels.append([(digit, turns, inverted) for digit in found["labels"][chosen]])
    labels = np.concatenate(labels).astype(np.int32)
    return ConceptGrid(
        jnp.asarray(np.concatenate(x)), jnp.asarray(labels), (10, 4, 2), ("digit", "rotation", "inversion")
    )


def random_relu_features(key: jax.Array, x: jax.Array, depth: int, width: int = 256) -> jax.Array:
    """Features of a network with random weights: the baseline of an encoder that has learnt nothing.

    Args:
      key: Random key.
      x: ``[examples, d]``, floating point.
      depth: Layers, each a Gaussian matrix of variance ``2 / inputs`` and a ReLU.
      width: Width of each layer.

    Returns:
      ``[examples, width]``.

    Raises:
      ValueError: ``depth`` or ``width`` is below 1.
    """
    if depth < 1 or width < 1:
        raise ValueError(f"depth, width: expected 1 or more, got {depth} and {width}")
    for own in jax.random.split(key, depth):
        kernel = jax.random.normal(own, (x.shape[1], width), x.dtype) * math.sqrt(2 / x.shape[1])
        x = jax.nn.relu(linalg.times(x, kernel))
    return x
