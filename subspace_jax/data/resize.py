"""Resizing of 8-bit images exactly as Pillow does it."""

import functools

import numpy as np

from subspace_jax.data.images.decode import check_pixels

METHODS = ("nearest", "bilinear", "bicubic", "lanczos")
_BITS = 22


def resize_uint8(
    image: np.ndarray, size: tuple[int, int], method: str = "bicubic", *, backend: str = "numpy"
) -> np.ndarray:
    """Resizes an image to the very numbers that Pillow 13 gives.

    Each axis is resized for itself, with the kernel widened where it shrinks, in whole numbers of 22 bits after the
    point, and rounded to 8 bits in between.

    Args:
      image: ``[height, width]`` or ``[height, width, channels]`` uint8.
      size: Height and width wanted.
      method: "nearest", "bilinear", "bicubic" or "lanczos".
      backend: "numpy", or "pillow" for what the installed Pillow makes of it (up to 12.2 it took the axes in
        another order where an image shrinks much more in height than in width).

    Returns:
      ``[*size]`` or ``[*size, channels]`` uint8.

    Raises:
      ValueError: A side is not positive, there are too many pixels, or method or backend is unknown.
      TypeError: The image is not uint8.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected uint8, got {image.dtype}")
    if image.ndim not in (2, 3) or min(*image.shape[:2], *size) < 1:
        raise ValueError(f"image: expected [height, width, channels] to {tuple(size)}, got shape {image.shape}")
    check_pixels(*size, what="size")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if backend not in ("numpy", "pillow"):
        raise ValueError(f"backend: expected 'numpy' or 'pillow', got {backend!r}")
    if backend == "pillow":
        return _pillow(image, size, method)
    (rows, columns), (height, width) = size, image.shape[:2]
    if method == "nearest":
        return image[_nearest(height, rows)][:, _nearest(width, columns)]
    # Pillow 13 begins with the axis that leaves less to be done.
    vertical_first = height > rows and height - rows > 2 * (width - columns)
    for axis in (0, 1) if vertical_first else (1, 0):
        if image.shape[axis] != size[axis]:
            image = _resize_axis(image, axis, size[axis], method)
    return image


def _resize_axis(image: np.ndarray, axis: int, m: int, method: str) -> np.ndarray:
    first, weights = _weights(image.shape[axis], m, method)
    # Rows are taken whole: along the second axis that means to turn the image.
    turned = np.ascontiguousarray(image.swapaxes(0, axis)).astype(np.int32)
    flat = turned.reshape(len(turned), -1)
    total = np.full((m, flat.shape[1]), 1 << (_BITS - 1), np.int32)
    part = np.empty_like(total)
    for k in range(weights.shape[1]):
        # Weights behind the end are zero.
        np.take(flat, first + k, axis=0, out=part, mode="clip")
        part *= weights[:, k, None]
        total += part
    total >>= _BITS
    made = np.clip(total, 0, 255, out=total).astype(np.uint8).reshape(m, *turned.shape[1:])
    return np.ascontiguousarray(made.swapaxes(0, axis))


@functools.lru_cache(maxsize=256)
def _weights(n: int, m: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every output the first input ``[m]``, and the whole-numbered weights from there on ``[m, taps]``."""
    kernel, reach = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0), "lanczos": (_lanczos, 3.0)}[method]
    scale = n / m
    stretch = max(scale, 1.0)
    reach = reach * stretch
    centres = (np.arange(m) + 0.5) * scale
    first = np.maximum(np.trunc(centres - reach + 0.5), 0).astype(int)
    last = np.minimum(np.trunc(centres + reach + 0.5), n).astype(int)
    taps = np.arange(int((last - first).max()))
    weights = kernel((taps + first[:, None] - centres[:, None] + 0.5) * (1.0 / stretch))
    weights = np.where(taps < (last - first)[:, None], weights, 0.0)
    # Added up one by one, for another order may end in another last digit.
    weights = weights / np.add.accumulate(weights, axis=1)[:, -1:]
    whole = np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    return first, whole


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3.0), 0.0)


def _nearest(n: int, m: int) -> np.ndarray:
    step = n / m
    return np.minimum(np.add.accumulate(np.r_[0.5 * step, np.full(m - 1, step)]).astype(int), n - 1)


def _pillow(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    from PIL import Image

    codes = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), codes[method]))
