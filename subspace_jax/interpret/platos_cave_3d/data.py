"""Paired features to try an alignment on: a planted subspace, halves of real digits, shapes with their words."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import random_orthonormal

SHAPES = ("sphere", "box", "cylinder", "torus")


def planted_pairs(
    key: jax.Array, n: int, shared: int = 4, widths: tuple[int, int] = (20, 14), *, noise: float = 2.0
) -> tuple[jax.Array, jax.Array]:
    """Pairs that share a few directions; all others are large noise of either side alone, and both are rotated.

    Args:
      key: Key of the features.
      n: Number of pairs.
      shared: Directions that both sides share, with variance 1 and a little noise.
      widths: Widths of both sides, above ``shared``.
      noise: Deviation of the other directions.

    Returns:
      ``[n, p]`` and ``[n, q]`` float32.

    Raises:
      ValueError: A width is no more than ``shared``.
    """
    if min(widths) <= shared:
        raise ValueError(f"widths: expected more than the {shared} shared directions, got {widths}")
    of_shared, *keys = jax.random.split(key, 3)
    common = jax.random.normal(of_shared, (n, shared))

    def side(key, width):
        of_noise, own, rotation = jax.random.split(key, 3)
        seen = common + 0.05 * jax.random.normal(own, (n, shared))
        private = noise * jax.random.normal(of_noise, (n, width - shared))
        return jnp.concatenate([seen, private], axis=1) @ random_orthonormal(rotation, width, width)

    return side(keys[0], widths[0]), side(keys[1], widths[1])


def digit_halves(seed: int, widths: tuple[int, int] = (256, 192)) -> tuple[np.ndarray, np.ndarray]:
    """Random features of the left and of the right halves of the 1,797 digits of scikit-learn, in a random order.

    What the halves share is which digit it is, and how it is written.

    Args:
      seed: Seed of the features, ``max(0, w . pixels + b)`` with Gaussian ``w`` and ``b``, and of the order.
      widths: Numbers of features of either half.

    Returns:
      ``[1797, 256]`` and ``[1797, 192]`` float32.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    images = load_digits().images / 16.0

    def features(half, width):
        pixels = half.reshape(len(half), -1)
        weights = rng.standard_normal((pixels.shape[1], width)) / np.sqrt(pixels.shape[1])
        return np.maximum(pixels @ weights + 0.1 * rng.standard_normal(width), 0)

    left, right = features(images[:, :, :4], widths[0]), features(images[:, :, 4:], widths[1])
    order = rng.permutation(len(images))
    return left[order].astype(np.float32), right[order].astype(np.float32)


def point_clouds(key: jax.Array, n: int, points: int = 128) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Point clouds of spheres, boxes, cylinders and tori of random proportions, with vectors of their descriptions.

    A description is the word of the shape and a word for each of three proportions, small to large in eight steps; its
    vector is the sum of fixed random vectors of its words.

    Args:
      key: Key of shapes, proportions, points and of the vectors of words.
      n: Number of clouds.
      points: Points of a cloud.

    Returns:
      Clouds ``[n, points, 3]``, vectors of descriptions ``[n, 32]``, both float32, and shapes ``[n]`` int32, indices of
      :data:`SHAPES`.
    """
    of_shape, of_size, of_points, of_words = jax.random.split(key, 4)
    kinds = jax.random.randint(of_shape, (n,), 0, len(SHAPES), jnp.int32)
    sizes = jax.random.uniform(of_size, (n, 3), minval=0.4, maxval=1.0)
    u, v, w = jnp.moveaxis(jax.random.uniform(of_points, (n, points, 3), minval=-1.0), -1, 0)
    angle, other = jnp.pi * u, jnp.pi * v
    around = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    ring = jnp.sqrt(jnp.maximum(1 - v**2, 0))[..., None] * around
    face = jnp.argmax(jnp.abs(jnp.stack([u, v, w], axis=-1)), axis=-1)[..., None] == jnp.arange(3)[None, None]
    cube = jnp.stack([u, v, w], axis=-1)
    clouds = jnp.stack(
        [
            jnp.concatenate([ring, v[..., None]], axis=-1),
            jnp.where(face, jnp.sign(cube), cube),
            jnp.concatenate([around, v[..., None]], axis=-1),
            jnp.concatenate(
                [(0.7 + 0.3 * jnp.cos(other))[..., None] * around, 0.3 * jnp.sin(other)[..., None]], axis=-1
            ),
        ]
    )
    clouds = clouds[kinds, jnp.arange(n)] * sizes[:, None]
    steps = jnp.floor((sizes - 0.4) / 0.6 * 8).astype(jnp.int32)
    words = jax.random.normal(of_words, (len(SHAPES) + 3 * 8, 32))
    named = words[kinds] + jnp.sum(words[len(SHAPES) + 8 * jnp.arange(3)[None] + steps], axis=1)
    return clouds, named, kinds
