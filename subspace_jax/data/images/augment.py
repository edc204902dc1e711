"""Random changes to training images of any size, one example at a time, and the plain crop for evaluation.

Images are bytes ``[height, width, 3]`` until the end.  Every function takes a NumPy generator: with the one that
:func:`subspace_jax.data.train_batches` gives for an example's place in the stream, a run that is resumed sees the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from subspace_jax.data.images.decode import check_pixels

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "EvalImage",
    "TrainImage",
    "color_jitter",
    "rand_augment",
    "random_erasing",
    "random_resized_crop",
    "standardize",
    "three_augment",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# What geometric changes uncover: the mean colour of ImageNet.
_FILL = (124, 116, 104)


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "bicubic",
) -> np.ndarray:
    """Cuts out a rectangle of random area and shape, and resizes it to a square.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Source of the rectangle.
      size: Side of the square.
      scale: Least and largest share of the image's area.
      ratio: Least and largest width over height; its logarithm is uniform.
      method: "bicubic" or "bilinear", with the antialiasing of Pillow.

    Returns:
      uint8 ``[size, size, 3]``.

    Source: Szegedy et al., Going Deeper with Convolutions (arXiv 1409.4842), section 6.
    """
    height, width = image.shape[:2]
    low, high = (math.log(r) for r in ratio)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            break
    else:
        # No such rectangle fits: the largest in the middle whose shape is in range.
        shape = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        top, left = (height - h) // 2, (width - w) // 2
    cut = Image.fromarray(image[top : top + h, left : left + w])
    return np.asarray(cut.resize((size, size), _METHODS[method]))


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in random order.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Source of factors and order.
      brightness: A factor is uniform in ``[max(0, 1 - brightness), 1 + brightness]``.
      contrast: Likewise.
      saturation: Likewise.
      hue: The hue is turned by up to this share of the circle, at most 0.5, either way.

    Returns:
      The shape and dtype of ``image``.
    """
    out = Image.fromarray(image)
    widths = (brightness, contrast, saturation)
    factors = [rng.uniform(max(0.0, 1 - width), 1 + width) for width in widths]
    turn = rng.uniform(-hue, hue)
    for which in rng.permutation(4):
        if which == 3:
            out = _turn_hue(out, turn) if hue else out
        elif widths[which]:
            kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            out = kinds[which](out).enhance(factors[which])
    return np.asarray(out)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shifted = ((np.asarray(h).astype(np.int32) + round(turn * 255)) % 256).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


def three_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Makes an image gray, solarises or blurs it, each with the same probability: 3-Augment of DeiT III.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Source of the choice and of the blur's radius.

    Returns:
      The shape and dtype of ``image``.

    Source: Touvron et al., DeiT III (arXiv 2204.07118), section 3.
    """
    out, which = Image.fromarray(image), rng.integers(3)
    if which == 0:
        return np.asarray(ImageOps.grayscale(out).convert("RGB"))
    if which == 1:
        return np.asarray(ImageOps.solarize(out, 128))
    return np.asarray(out.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))))


def rand_augment(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    operations: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
    probability: float = 0.5,
) -> np.ndarray:
    """Applies operations chosen at random, all of which grow with one magnitude ("increasing", as timm's ``inc1``).

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Source of choices, magnitudes and signs.
      operations: How many are chosen, with repetition.
      magnitude: Mean of the magnitude, 0 to 10.
      deviation: Its standard deviation; it is clipped to 0 to 10.
      probability: Of applying an operation that was chosen.

    Returns:
      The shape and dtype of ``image``.

    Source: Cubuk et al., RandAugment (arXiv 1909.13719), with the operations of timm.
    """
    out = Image.fromarray(image)
    for which in rng.integers(len(_OPERATIONS), size=operations):
        applied, sign, level = rng.random(), rng.choice((-1.0, 1.0)), rng.normal(magnitude, deviation)
        if applied < probability:
            out = _OPERATIONS[which](out, min(max(level, 0.0), 10.0) / 10, sign)
    return np.asarray(out)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_FILL)


def _enhance(kind: type) -> object:
    return lambda image, level, sign: kind(image).enhance(max(0.1, 1 + sign * 0.9 * level))


def _solarize_add(image: Image.Image, level: float, sign: float) -> Image.Image:
    del sign
    added = int(110 * level)
    return image.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


# From an image, a level in [0, 1] and a sign.
_OPERATIONS = (
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: ImageOps.invert(image),
    lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=_FILL),
    lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    lambda image, level, sign: ImageOps.solarize(image, 256 - min(256, int(256 * level))),
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda image, level, sign: _affine(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, sign * 0.45 * level * image.width, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * level * image.height),
)


def random_erasing(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """Fills a rectangle with noise that is standard normal once the image is standardised, as far as bytes can be.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Source of rectangle and noise.
      area: Least and largest share of the image's area.
      ratio: Least and largest height over width; its logarithm is uniform.
      mean: Mean of the noise, of pixels from 0 to 1.
      std: Its deviation.

    Returns:
      A new image of the same shape and dtype; the same image where no rectangle fits in ten attempts.

    Source: Zhong et al., Random Erasing (arXiv 1708.04896).
    """
    height, width = image.shape[:2]
    for _ in range(10):
        size = height * width * rng.uniform(*area)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = 255 * (np.asarray(mean) + np.asarray(std) * rng.standard_normal((h, w, 3)))
            out = image.copy()
            out[top : top + h, left : left + w] = np.clip(np.round(noise), 0, 255)
            return out
    return image


def standardize(
    image: np.ndarray, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> np.ndarray:
    """Returns ``(image / 255 - mean) / std`` in float32; ``image`` is uint8 ``[..., 3]``, NumPy's or JAX's."""
    scale = np.asarray(1 / (255 * np.asarray(std, np.float64)), np.float32)
    shift = np.asarray(-np.asarray(mean, np.float64) / np.asarray(std, np.float64), np.float32)
    lead = (1,) * (image.ndim - 1)
    return image.astype(np.float32) * scale.reshape(*lead, -1) + shift.reshape(*lead, -1)


@dataclass(frozen=True)
class TrainImage:
    """The changes of a training recipe, as a transform of :func:`subspace_jax.data.train_batches`.

    They come in the order of the attributes.

    Attributes:
      size: Side of the square that comes out.
      scale: See :func:`random_resized_crop`.
      ratio: See :func:`random_resized_crop`.
      method: See :func:`random_resized_crop`.
      flip: Probability of mirroring.
      three_augment: Whether to apply :func:`three_augment`.
      operations: How many of :func:`rand_augment`; 0 for none.
      magnitude: See :func:`rand_augment`.
      deviation: See :func:`rand_augment`.
      jitter: Brightness, contrast, saturation and hue of :func:`color_jitter`.
      erase: Probability of :func:`random_erasing`.
      mean: Mean of pixels from 0 to 1, one a channel.
      std: Their deviation.
      as_bytes: Whether to leave the pixels as bytes, for :func:`standardize` on the device: a quarter of the transfer.
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
        _check_output(self.size, self.method, self.mean, self.std)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"{name}: expected 0 < low <= high{' <= 1' * (name == 'scale')}, got {(low, high)}")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        if not 0 <= self.magnitude <= 10 or not self.deviation >= 0 or self.operations < 0:
            raise ValueError(
                f"magnitude: expected 0 to 10, got {self.magnitude}; deviation and operations: at least 0, got "
                f"{self.deviation} and {self.operations}"
            )
        if len(self.jitter) != 4 or not all(0 <= x < math.inf for x in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(f"jitter: expected four numbers from 0, the last up to 0.5, got {self.jitter}")

    def __call__(self, example: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Changes ``inputs``, uint8 ``[height, width, 3]``, to ``[size, size, 3]``, float32 or uint8."""
        image = _check_image(example["inputs"])
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


@dataclass(frozen=True)
class EvalImage:
    """Resizes the shorter side and cuts out the middle, for :meth:`subspace_jax.data.Images.map`.

    Attributes:
      size: Side of the square that comes out.
      crop: The shorter side becomes ``floor(size / crop)`` before.
      method: "bicubic" or "bilinear".
      mean: Mean of pixels from 0 to 1, one a channel.
      std: Their deviation.
      as_bytes: Whether to leave the pixels as bytes.
    """

    size: int
    crop: float = 0.875
    method: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    as_bytes: bool = False

    def __post_init__(self):
        _check_output(self.size, self.method, self.mean, self.std)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop: expected a share in (0, 1], got {self.crop}")
        check_pixels(int(self.size / self.crop), int(self.size / self.crop), "size / crop")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Changes uint8 ``[height, width, 3]`` to ``[size, size, 3]``, float32 or uint8."""
        height, width = _check_image(image).shape[:2]
        shorter = math.floor(self.size / self.crop)
        factor = shorter / min(height, width)
        h, w = (shorter if n == min(height, width) else max(shorter, int(n * factor)) for n in (height, width))
        check_pixels(h, w, f"image of {width} x {height}, resized")
        top, left = (h - self.size) // 2, (w - self.size) // 2
        image = np.asarray(Image.fromarray(image).resize((w, h), _METHODS[self.method]))
        image = image[top : top + self.size, left : left + self.size]
        return image if self.as_bytes else standardize(image, self.mean, self.std)


def _check_output(size: int, method: str, mean: Sequence[float], std: Sequence[float]) -> None:
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    check_pixels(size, size, "size")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {sorted(_METHODS)}, got {method!r}")
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean and std: expected three numbers each, finite, std positive, got {mean} and {std}")


def _check_image(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"inputs: expected bytes [height, width, 3], got {image.dtype} {list(image.shape)}")
    return image
