"""Images as a checkpoint expects them: what a ``preprocessor_config.json``, or timm's config, says to do."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from subspace_jax.data.resize import METHODS, resize_uint8

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CODES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _defaults(size: Any, resample: int, crop: int | None, numbers: tuple) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": size,
        "resample": resample,
        "do_center_crop": crop is not None,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": numbers[0],
        "image_std": numbers[1],
    }


# By the beginning of the processor's name: its defaults, and whether a bare integer as size means the shorter side.
_PROCESSORS = {
    "CLIP": (_defaults({"shortest_edge": 224}, 3, 224, _CLIP), True),
    "Bit": (_defaults({"shortest_edge": 224}, 3, 224, _CLIP), True),
    "Siglip": (_defaults({"height": 224, "width": 224}, 3, None, _HALF), True),
    "ViT": (_defaults({"height": 224, "width": 224}, 2, None, _HALF), False),
    "DeiT": (_defaults({"height": 256, "width": 256}, 3, 224, _HALF), False),
    "ConvNext": ({**_defaults({"shortest_edge": 384}, 3, None, _HALF), "crop_pct": 0.875}, True),
}


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
        sides = [side for sides in (self.size, self.crop) if sides is not None for side in np.atleast_1d(sides)]
        if any(side < 1 for side in sides):
            raise ValueError(f"size and crop: expected positive sides, got {self.size} and {self.crop}")

    @classmethod
    def from_json(cls, source: str | os.PathLike | Mapping[str, Any], *, backend: str = "numpy") -> "ImageProcessor":
        """Reads Hugging Face's ``preprocessor_config.json``, or timm's ``config.json``.

        Args:
          source: The fields, the file, or the checkpoint folder that it is in.
          backend: See :func:`resize_uint8`.

        Raises:
          FileNotFoundError: There is no such file.
          ValueError: The processor, or something that it does, is not supported.
        """
        fields = source if isinstance(source, Mapping) else _read(pathlib.Path(source))
        timm = "pretrained_cfg" in fields or "input_size" in fields
        return dataclasses.replace(_from_timm(fields) if timm else _from_hf(fields), backend=backend)

    def __call__(self, image: Any) -> np.ndarray:
        """Prepares an image.

        Args:
          image: ``[height, width]`` or ``[height, width, 1, 3 or 4]`` uint8, or a Pillow image; gray is repeated, what
            is transparent is blended with white.

        Returns:
          ``[height, width, 3]`` float32.

        Raises:
          TypeError: The image is not uint8; one in [0, 1] would be scaled twice.
          ValueError: It has another number of channels.
        """
        image = _rgb(image)
        if self.size is not None:
            size = self.size if isinstance(self.size, tuple) else _keep_ratio(image.shape[:2], self.size)
            image = resize_uint8(image, size, self.method, backend=self.backend)
        if self.crop is not None:
            image = _crop(image, self.crop, self.crop_rounding)
        values = image.astype(np.float32)
        values *= np.float32(self.scale)
        values -= np.asarray(self.mean, np.float32)
        values /= np.asarray(self.std, np.float32)
        return values


def _from_hf(fields: Mapping[str, Any]) -> ImageProcessor:
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    found = next((name for name in _PROCESSORS if str(kind).startswith(name)), None)
    if found is None:
        raise ValueError(f"image_processor_type: {kind!r} is not supported; expected one of {sorted(_PROCESSORS)}")
    defaults, shorter = _PROCESSORS[found]
    own = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    size, crop = _hf_size(own["size"], shorter), own["crop_size"]
    if crop is not None:
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
    if found == "ConvNext" and own["do_resize"]:
        # Small sizes are cut out of a larger picture, large ones take all of it.
        side = size if isinstance(size, int) else size[0]
        size, crop = (int(side / own["crop_pct"]), (side, side)) if side < 384 else ((side, side), None)
    elif not own["do_center_crop"]:
        crop = None
    if own["resample"] not in _CODES:
        raise ValueError(f"resample: expected one of {_CODES}, got {own['resample']!r}")
    normal = own["do_normalize"]
    return ImageProcessor(
        size=size if own["do_resize"] else None,
        method=_CODES[own["resample"]],
        crop=crop,
        scale=own["rescale_factor"] if own["do_rescale"] else 1.0,
        mean=tuple(own["image_mean"]) if normal else (0.0, 0.0, 0.0),
        std=tuple(own["image_std"]) if normal else (1.0, 1.0, 1.0),
    )


def _from_timm(fields: Mapping[str, Any]) -> ImageProcessor:
    own = {
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": _IMAGENET[0],
        "std": _IMAGENET[1],
    }
    own |= {name: value for name, value in (fields.get("pretrained_cfg") or fields).items() if value is not None}
    if "input_size" not in own:
        raise ValueError("input_size: missing from timm's pretrained_cfg")
    height, width = own["input_size"][-2:]
    scaled = math.floor(height / own["crop_pct"]), math.floor(width / own["crop_pct"])
    if own["crop_mode"] == "squash":
        size: tuple[int, int] | int = scaled
    elif own["crop_mode"] == "center" and height == width:
        size = scaled[0]
    else:
        raise ValueError(f"crop_mode: {own['crop_mode']!r} is not supported for images of {height} x {width}")
    return ImageProcessor(
        size=size,
        method=own["interpolation"],
        crop=(height, width),
        crop_rounding="even",
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
    if path.is_dir():
        names = [path / "preprocessor_config.json", path / "config.json"]
        own = next((file for file in names if file.exists()), names[0])
        fields = _json(own)
        if own.name == "config.json" and "pretrained_cfg" not in fields:
            raise FileNotFoundError(f"{names[0]}: no such file, and {own.name} is none of timm's, which says as much")
        return fields
    return _json(path)


def _json(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected how images are to be prepared")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object: {error}") from error


def _hf_size(size: Any, shorter: bool) -> tuple[int, int] | int:
    if isinstance(size, int):
        return size if shorter else (size, size)
    if "shortest_edge" in size:
        if "longest_edge" in size:
            raise ValueError(f"size: a bound on the longer side is not supported, got {size}")
        return size["shortest_edge"]
    if not {"height", "width"} <= set(size):
        raise ValueError(f"size: expected height and width, or shortest_edge; got {size}")
    return size["height"], size["width"]


def _rgb(image: Any) -> np.ndarray:
    if hasattr(image, "convert"):
        modes = ("L", "RGB", "RGBA")
        image = np.asarray(image if image.mode in modes else image.convert("RGBA" if "A" in image.mode else "RGB"))
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected uint8 in [0, 255], got {image.dtype}")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image: expected [height, width, 1, 3 or 4], got shape {image.shape}")
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
