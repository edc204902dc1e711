"""Preprocessing of images for a checkpoint: its ``preprocessor_config.json``, or timm's config."""

import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from subspace_jax.data.images.decode import check_pixels, decode_image
from subspace_jax.data.images.processor_config import find_processor, processor_arguments
from subspace_jax.data.images.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    METHODS,
    center_crop,
    resize,
    resized_shape,
    standardize,
)


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes, crops and standardizes an image.

    Attributes:
      size: Height and width, or the length of the shorter side; None for no resizing.
      method: "nearest", "bilinear", "bicubic" or "lanczos".
      crop: Height and width of the center crop; None for no crop.
      crop_rounding: Position of the crop where a margin is odd: "floor" (Hugging Face) or "even" (timm).
      scale: Factor of the 8-bit values.
      mean: Mean of each channel, after scaling.
      std: Standard deviation of each channel.
      as_bytes: Whether to return uint8 pixels, for :func:`standardize` on the device: a quarter of the transfer.
    """

    size: tuple[int, int] | int | None = 224
    method: str = "bicubic"
    crop: tuple[int, int] | None = (224, 224)
    crop_rounding: str = "floor"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    as_bytes: bool = False

    def __post_init__(self):
        for name, known in (("method", METHODS), ("crop_rounding", ("floor", "even"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}: expected a number for each of 3 channels, got {getattr(self, name)}")
        for name, values in (("scale", (self.scale,)), ("mean", self.mean), ("std", self.std)):
            if not all(math.isfinite(x) and (x > 0 or name == "mean") for x in values):
                raise ValueError(
                    f"{name}: expected {'' if name == 'mean' else 'positive '}finite numbers, got {values}"
                )
        for name, sides in (("size", self.size), ("crop", self.crop)):
            if sides is not None:
                _check_sides(name, sides)

    @classmethod
    def evaluation(cls, size: int, *, crop: float = 0.875, **fields: Any) -> "ImageProcessor":
        """Returns the usual evaluation preprocessing: resize the shorter side, crop the center, ImageNet statistics.

        Args:
          size: Side of the square result.
          crop: Fraction of the resized image that is kept: the shorter side becomes ``floor(size / crop)``.
          **fields: Further attributes.

        Raises:
          ValueError: A field is out of range.
        """
        if not 0 < crop <= 1:
            raise ValueError(f"crop: expected a fraction in (0, 1], got {crop}")
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {size}")
        fields = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **fields}
        return cls(math.floor(size / crop), crop=(size, size), **fields)

    @classmethod
    def from_json(cls, source: str | os.PathLike | Mapping[str, Any]) -> "ImageProcessor":
        """Reads the preprocessing of a Hugging Face or timm checkpoint.

        In a folder the first of these counts, as in transformers: the ``image_processor`` in ``processor_config.json``,
        timm's ``pretrained_cfg`` in ``config.json``, ``preprocessor_config.json``.

        Args:
          source: The fields, the file, or the checkpoint folder.

        Raises:
          FileNotFoundError: There is no such file.
          ValueError: The processor or one of its steps is not supported, a field is misspelt, or a value is invalid.
        """
        file, fields = None, source
        if not isinstance(source, Mapping):
            file, fields = find_processor(pathlib.Path(source).expanduser())
        try:
            return cls(**processor_arguments(fields))
        except ValueError as error:
            if file is None:
                raise
            raise ValueError(f"{file}: {error}") from error

    def __call__(self, image: Any) -> np.ndarray:
        """Preprocesses an image.

        Args:
          image: uint8 ``[height, width]`` or ``[height, width, 1, 3 or 4]``; gray is repeated, transparency is blended
            with white.  Or a Pillow image, see :func:`decode_image`.

        Returns:
          ``[height, width, 3]``, float32 or uint8.

        Raises:
          TypeError: The array is not uint8.
          ValueError: It has another number of channels, no pixels, or too many, before or after resizing.
          OSError: The file of the Pillow image is damaged.
        """
        image = _rgb(image)
        if self.size is not None:
            size = self.size if isinstance(self.size, tuple) else resized_shape(image.shape[:2], self.size)
            image = resize(image, size, self.method)
        if self.crop is not None:
            image = center_crop(image, self.crop, self.crop_rounding)
        return image if self.as_bytes else standardize(image, self.mean, self.std, self.scale)


def _check_sides(name: str, sides: Any) -> None:
    pair = sides if isinstance(sides, tuple) else (sides, sides)
    whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in pair)
    if len(pair) != 2 or not whole or min(pair) < 1:
        raise ValueError(f"{name}: expected positive sides in pixels, got {sides!r}")
    check_pixels(*pair, what=name)


def _rgb(image: Any) -> np.ndarray:
    if isinstance(image, Image.Image):
        return decode_image(image)
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected uint8 in [0, 255], got {image.dtype}")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image: expected [height, width, 1, 3 or 4], got shape {image.shape}")
    check_pixels(*image.shape[:2])
    if image.shape[-1] == 1:
        return np.repeat(image, 3, axis=-1)
    if image.shape[-1] == 4:
        alpha = image[..., 3:].astype(np.float32) / 255
        image = np.rint(alpha * image[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return image
