"""The random transforms of a training recipe for images of any size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from subspace_jax.data.images.augment import (
    color_jitter,
    rand_augment,
    random_erasing,
    random_resized_crop,
    three_augment,
)
from subspace_jax.data.images.decode import check_pixels
from subspace_jax.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, METHODS, standardize

__all__ = ["TrainImage"]


@dataclass(frozen=True)
class TrainImage:
    """A training recipe, as a transform of :func:`subspace_jax.data.train_batches`, in the order of the attributes.

    Attributes:
      size: Side of the square result.
      scale: See :func:`random_resized_crop`.
      ratio: See :func:`random_resized_crop`.
      method: See :func:`random_resized_crop`.
      flip: Probability of a horizontal flip.
      three_augment: Whether to apply :func:`three_augment`.
      operations: Number of operations of :func:`rand_augment`; 0 for none.
      magnitude: See :func:`rand_augment`.
      deviation: See :func:`rand_augment`.
      jitter: Brightness, contrast, saturation and hue of :func:`color_jitter`.
      erase: Probability of :func:`random_erasing`.
      mean: Mean of each channel, of pixels from 0 to 1.
      std: Their standard deviation.
      as_bytes: Whether to return uint8 pixels, for :func:`standardize` on the device: a quarter of the transfer.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    method: str = "bicubic"
    flip: float = 0.5
    three_augment: bool = False
    operations: int = 0
    magnitude: float = 9.0
    deviation: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    erase: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    as_bytes: bool = False

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")
        check_pixels(self.size, self.size, "size")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {self.method!r}")
        mean, std = self.mean, self.std
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(f"mean and std: expected three numbers each, finite, std positive, got {mean} and {std}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"{name}: expected 0 < low <= high{' <= 1' * (name == 'scale')}, got {(low, high)}")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        self._check_strengths()

    def _check_strengths(self) -> None:
        if not 0 <= self.magnitude <= 10 or not self.deviation >= 0 or self.operations < 0:
            raise ValueError(
                f"magnitude: expected 0 to 10, got {self.magnitude}; deviation and operations: at least 0, got "
                f"{self.deviation} and {self.operations}"
            )
        if len(self.jitter) != 4 or not all(0 <= x < math.inf for x in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(f"jitter: expected four numbers from 0, the last up to 0.5, got {self.jitter}")

    def __call__(self, example: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Transforms ``inputs``, uint8 ``[height, width, 3]``, to ``[size, size, 3]``, float32 or uint8."""
        image = example["inputs"]
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"inputs: expected uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
        image = random_resized_crop(image, rng, self.size, scale=self.scale, ratio=self.ratio, method=self.method)
        if rng.random() < self.flip:
            image = np.ascontiguousarray(image[:, ::-1])
        if self.three_augment:
            image = three_augment(image, rng)
        if self.operations:
            image = rand_augment(
                image, rng, operations=self.operations, magnitude=self.magnitude, deviation=self.deviation
            )
        if any(self.jitter):
            kinds = ("brightness", "contrast", "saturation", "hue")
            image = color_jitter(image, rng, **dict(zip(kinds, self.jitter, strict=True)))
        if rng.random() < self.erase:
            image = random_erasing(image, rng, mean=self.mean, std=self.std)
        return {**example, "inputs": image if self.as_bytes else standardize(image, self.mean, self.std)}
