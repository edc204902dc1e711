"""Images as a checkpoint expects them: what a ``preprocessor_config.json``, or timm's config, says to do."""

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
from subspace_jax.data.resize import METHODS, resize_uint8


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes, crops and normalises single images; a plain function of an image, to be mapped over a data set.

    Attributes:
      size: Height and width that an image is squashed to, or the length that its shorter side gets; None to leave it.
      method: How; one of "nearest", "bilinear", "bicubic", "lanczos".
      crop: Height and width of what is cut out of the middle; None for all.
      crop_rounding: Where the middle is if a pixel is left over: "floor" (Hugging Face) or "even" (timm).
      scale: Factor of the 8-bit values.
      mean: Subtracted from the channels after that.
      std: Divides them then.
      backend: What resizes, see :func:`resize_uint8`.
    """

    size: tuple[int, int] | int | None = 224
    method: str = "bicubic"
    crop: tuple[int, int] | None = (224, 224)
    crop_rounding: str = "floor"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    backend: str = "numpy"

    def __post_init__(self):
        choices = {"method": METHODS, "crop_rounding": ("floor", "even"), "backend": ("numpy", "pillow")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name}: expected a number for each of 3 channels, got {getattr(self, name)}")
        numbers = {"scale": (self.scale,), "mean": self.mean, "std": self.std}
        for name, values in numbers.items():
            if not all(math.isfinite(x) and (x > 0 or name == "mean") for x in values):
                raise ValueError(
                    f"{name}: expected {'' if name == 'mean' else 'positive '}finite numbers, got {values}"
                )
        for name, sides in (("size", self.size), ("crop", self.crop)):
            if sides is None:
                continue
            pair = sides if isinstance(sides, tuple) else (sides, sides)
            whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in pair)
            if len(pair) != 2 or not whole or min(pair) < 1:
                raise ValueError(f"{name}: expected positive sides in pixels, got {sides!r}")
            check_pixels(*pair, what=name)

    @classmethod
    def from_json(cls, source: str | os.PathLike | Mapping[str, Any], *, backend: str = "numpy") -> "ImageProcessor":
        """Reads how images are prepared, as Hugging Face or timm says it.

        In a folder the first of these counts, as in transformers: the ``image_processor`` in ``processor_config.json``,
        timm's ``pretrained_cfg`` in ``config.json``, ``preprocessor_config.json``.

        Args:
          source: The fields, the file, or the checkpoint folder that it is in.
          backend: See :func:`resize_uint8`.

        Raises:
          FileNotFoundError: There is no such file.
          ValueError: The processor or something that it does is not supported, a field is misspelt, or a value is not
            of its kind.
        """
        file, fields = None, source
        if not isinstance(source, Mapping):
            file, fields = find_processor(pathlib.Path(source).expanduser())
        try:
            return cls(**processor_arguments(fields), backend=backend)
        except ValueError as error:
            if file is None:
                raise
            raise ValueError(f"{file}: {error}") from error

    def __call__(self, image: Any) -> np.ndarray:
        """Prepares an image.

        Args:
          image: ``[height, width]`` or ``[height, width, 1, 3 or 4]`` uint8; gray is repeated, what is transparent is
            blended with white.  Or a Pillow image, which :func:`decode_image` decodes.

        Returns:
          ``[height, width, 3]`` float32.

        Raises:
          TypeError: The array is not uint8; one in [0, 1] would be scaled twice.
          ValueError: It has another number of channels or no pixels, or it has too many, as it is or resized.
          OSError: The file of the Pillow image is damaged.
        """
        image = _rgb(image)
        if self.size is not None:
            size = self.size if isinstance(self.size, tuple) else _keep_ratio(image.shape[:2], self.size)
            check_pixels(*size, what=f"image of {image.shape[1]} x {image.shape[0]}, resized")
            image = resize_uint8(image, size, self.method, backend=self.backend)
        if self.crop is not None:
            image = _crop(image, self.crop, self.crop_rounding)
        values = image.astype(np.float32)
        values *= np.float32(self.scale)
        values -= np.asarray(self.mean, np.float32)
        values /= np.asarray(self.std, np.float32)
        return values


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


def _keep_ratio(shape: tuple[int, int], shorter: int) -> tuple[int, int]:
    height, width = shape
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _crop(image: np.ndarray, size: tuple[int, int], rounding: str) -> np.ndarray:
    """Cuts out the middle; what is too small gets black borders first."""
    short = [max(wanted - side, 0) for side, wanted in zip(image.shape, size, strict=False)]
    if any(short):
        # The odd row is above in Hugging Face's border, and below in timm's.
        before = [(n + 1) // 2 if rounding == "floor" else n // 2 for n in short]
        image = np.pad(image, [(b, n - b) for b, n in zip(before, short, strict=True)] + [(0, 0)])
    left = [side - wanted for side, wanted in zip(image.shape, size, strict=False)]
    top, start = (n // 2 if rounding == "floor" else round(n / 2) for n in left)
    return image[top : top + size[0], start : start + size[1]]
