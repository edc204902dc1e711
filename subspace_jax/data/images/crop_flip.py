"""Random changes to training images, one example at a time, in NumPy."""

from collections.abc import Mapping

import numpy as np

__all__ = ["random_crop_flip"]


def random_crop_flip(
    example: Mapping[str, np.ndarray], rng: np.random.Generator, *, padding: int = 4
) -> dict[str, np.ndarray]:
    """Shifts an image by up to ``padding`` pixels each way, and mirrors it with probability one half.

    The usual training change for CIFAR: a crop of the original size out of the image padded with zeros, then a
    horizontal flip.  Zero is black, or the mean colour where ``image_source`` was given ``mean`` and ``std``.

    Args:
      example: Fields of one example; ``inputs``: ``[height, width, channels]``, any dtype.
      rng: Source of the shift and the flip; three numbers are drawn.
      padding: Largest shift, in pixels; at least 0 and below height and width.

    Returns:
      The example with a new ``inputs`` of the same shape and dtype; the other fields as they were.

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
    # Cutting and pasting what stays in sight is several times faster than np.pad.
    dy = int(down * (2 * padding + 1)) - padding
    dx = int(right * (2 * padding + 1)) - padding
    out = np.zeros_like(image)
    out[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)] = image[
        max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)
    ]
    return {**example, "inputs": out[:, ::-1] if flip < 0.5 else out}
