"""Random transforms of training images, one example at a time.

Images are uint8 ``[height, width, 3]``.  Every function takes a NumPy generator;
:func:`subspace_jax.data.train_batches` passes one that depends on the seed and on the example's position in the stream,
so that a resumed run sees the same images.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from subspace_jax.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, resize

__all__ = [
    "color_jitter",
    "rand_augment",
    "random_crop_flip",
    "random_erasing",
    "random_resized_crop",
    "three_augment",
]

# Pixels outside the image after geometric operations: the mean color of ImageNet.
_FILL = (124, 116, 104)


def random_crop_flip(
    example: Mapping[str, np.ndarray], rng: np.random.Generator, *, padding: int = 4
) -> dict[str, np.ndarray]:
    """Random crop of the padded image and horizontal flip, the usual augmentation for CIFAR.

    The image is padded with zeros; where ``image_source`` was given ``mean`` and ``std``, zero is the mean color.

    Args:
      example: Fields of one example; ``inputs``: ``[height, width, channels]``, any dtype.
      rng: Random generator; three numbers are drawn.
      padding: Padding on each side in pixels, at least 0 and below height and width.

    Returns:
      The example with new ``inputs`` of the same shape and dtype.

    Raises:
      ValueError: ``inputs`` is not an image, or ``padding`` is out of range.

    Source: He et al., Deep Residual Learning (arXiv 1512.03385), section 4.2.
    """
    image = example["inputs"]
    if image.ndim != 3:
        raise ValueError(f"inputs: expected an image [height, width, channels], got shape {list(image.shape)}")
    height, width = image.shape[:2]
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding: expected 0 to {min(height, width) - 1} for {height}x{width} pixels, got {padding}")
    down, right, flip = rng.random(3)
    # Copying the visible part is several times faster than np.pad.
    dy = int(down * (2 * padding + 1)) - padding
    dx = int(right * (2 * padding + 1)) - padding
    out = np.zeros_like(image)
    out[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = image[
        max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)
    ]
    return {**example, "inputs": out[:, ::-1] if flip < 0.5 else out}


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    method: str = "bicubic",
) -> np.ndarray:
    """Crops a rectangle of random area and aspect ratio, and resizes it to a square.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Random generator.
      size: Side of the square.
      scale: Range of the crop's area, as a fraction of the image's.
      ratio: Range of the aspect ratio, width over height; its logarithm is uniform.
      method: See :func:`resize`.

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
        # No such rectangle fits: the largest central one whose aspect ratio is in range.
        shape = min(max(width / height, ratio[0]), ratio[1])
        w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
        top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], (size, size), method)


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
      rng: Random generator.
      brightness: A factor is uniform in ``[max(0, 1 - brightness), 1 + brightness]``.
      contrast: Likewise.
      saturation: Likewise.
      hue: The hue is rotated by up to this fraction of the circle, at most 0.5, either way.

    Returns:
      The shape and dtype of ``image``.
    """
    out = Image.fromarray(image)
    widths = (brightness, contrast, saturation)
    factors = [rng.uniform(max(0.0, 1 - width), 1 + width) for width in widths]
    rotation = rng.uniform(-hue, hue)
    for which in rng.permutation(4):
        if which == 3:
            out = _rotate_hue(out, rotation) if hue else out
        elif widths[which]:
            kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            out = kinds[which](out).enhance(factors[which])
    return np.asarray(out)


def _rotate_hue(image: Image.Image, rotation: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shifted = ((np.asarray(h).astype(np.int32) + round(rotation * 255)) % 256).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


def three_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grayscale, solarization or Gaussian blur with equal probabilities: 3-Augment of DeiT III.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Random generator.

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
    """Applies random operations of one magnitude (timm's "increasing" variant, ``inc1``).

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Random generator.
      operations: Number of operations, drawn with replacement.
      magnitude: Mean of the magnitude, 0 to 10.
      deviation: Standard deviation of the magnitude, which is clipped to 0 to 10.
      probability: Probability that a drawn operation is applied.

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


# Functions of an image, a level in [0, 1] and a sign.
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
    """Fills a random rectangle with noise, standard normal after standardization up to 8-bit rounding.

    Args:
      image: uint8 ``[height, width, 3]``.
      rng: Random generator.
      area: Range of the rectangle's area, as a fraction of the image's.
      ratio: Range of height over width; its logarithm is uniform.
      mean: Mean of the noise, of pixels from 0 to 1.
      std: Its standard deviation.

    Returns:
      A new image of the same shape and dtype; the image itself where no rectangle fits in ten attempts.

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
