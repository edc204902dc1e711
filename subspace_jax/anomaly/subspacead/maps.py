"""From scores of patches to anomaly maps of pixels, and from maps to scores of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.anomaly.subspacead.core import tail_mean

AGGREGATIONS = ("mtop1p", "max", "p99", "mtop5", "mean")


def anomaly_map(
    scores: jax.Array,
    size: tuple[int, int],
    *,
    sigma: float = 4.0,
    kernel_size: int | None = 3,
    close: int | None = None,
) -> jax.Array:
    """Resizes scores of patches to pixels, closes holes, and blurs (step 6 of the method of arXiv 2602.23013).

    Bilinear interpolation with half-pixel centers; then a grey closing with a box; then a Gaussian blur with mirrored
    borders.  The authors' window of three pixels makes the blur nearly a box filter.

    Args:
      scores: ``[batch, h, w]``, floating point.
      size: Height and width of the maps.
      sigma: Standard deviation of the blur in pixels; 0 for none.
      kernel_size: Side of its window, odd; None for the full width of four ``sigma`` to each side.
      close: Side of the box of the closing, odd, 5 in the authors' code; None for none.

    Returns:
      ``[batch, height, width]``, float32 or float64.

    Raises:
      ValueError: A shape or an option is out of range.
    """
    if scores.ndim != 3 or 0 in scores.shape:
        raise ValueError(f"scores: expected [batch, h, w], got shape {list(scores.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected height and width, got {size}")
    for name, side in (("kernel_size", kernel_size), ("close", close)):
        if side is not None and (side < 1 or side % 2 == 0):
            raise ValueError(f"{name}: expected an odd number of pixels, or None, got {side}")
    if sigma < 0:
        raise ValueError(f"sigma: expected at least 0, got {sigma}")
    x = scores.astype(jnp.float64 if scores.dtype == jnp.float64 else jnp.float32)
    x = _interpolate(_interpolate(x, size[0], 1), size[1], 2)
    if close is not None:
        x = _grey_closing(x, close)
    return _blur(x, sigma, kernel_size) if sigma else x


def image_scores(maps: jax.Array, how: str = "mtop1p") -> jax.Array:
    """Scores of images from their maps (step 7 of the method).

    Args:
      maps: ``[batch, height, width]``.
      how: "mtop1p" (mean of the top 1 %), "max", "p99" (99th percentile), "mtop5" (mean of the top 5 pixels), "mean".

    Returns:
      ``[batch]``.

    Raises:
      ValueError: The aggregation is unknown.
    """
    flat = maps.reshape(maps.shape[0], -1)
    if how == "mtop1p":
        return tail_mean(flat)
    if how == "mtop5":
        return jnp.mean(jax.lax.top_k(flat, min(5, flat.shape[1]))[0], axis=1)
    if how == "p99":
        return jnp.percentile(flat, 99, axis=1)
    if how not in AGGREGATIONS:
        raise ValueError(f"how: expected one of {AGGREGATIONS}, got {how!r}")
    return jnp.max(flat, axis=1) if how == "max" else jnp.mean(flat, axis=1)


def background_mask(saliency: jax.Array, how: str = "quantile", quantile: float = 0.15) -> jax.Array:
    """Which patches show the object rather than the background (step 8, off by default).

    Args:
      saliency: Saliency of each patch, ``[batch, h, w]``.
      how: "quantile", or "otsu" for the threshold of Otsu over 256 levels between the extremes of an image.
      quantile: Share of the patches of an image that are background.

    Returns:
      ``[batch, h, w]`` bool, False for background.

    Raises:
      ValueError: ``how`` is unknown, or the share is out of range.
    """
    if how not in ("quantile", "otsu"):
        raise ValueError(f"how: expected 'quantile' or 'otsu', got {how!r}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected a share in [0, 1], got {quantile}")
    flat = saliency.reshape(saliency.shape[0], -1)
    limit = jnp.quantile(flat, quantile, axis=1) if how == "quantile" else jax.vmap(_otsu)(flat)
    return saliency >= limit[:, None, None]


def tile_origins(height: int, width: int, tile: int, overlap: float) -> np.ndarray:
    """Corners of the tiles of an image (step 9), row by row; tiles at the border are moved back inside.

    Args:
      height: Of the image, at least ``tile``.
      width: Likewise.
      tile: Side of a tile in pixels.
      overlap: Share of a tile that the next one repeats, in [0, 1).

    Returns:
      ``[tiles, 4]`` int64: left, top, right, bottom; the last ones of a row or column may repeat others.

    Raises:
      ValueError: The image is smaller than a tile, or the overlap is out of range.
    """
    step = int(tile * (1 - overlap)) if 0 <= overlap < 1 else 0
    if step < 1:
        raise ValueError(f"overlap: expected a share in [0, 1) that leaves a step of a pixel, got {overlap}")
    if min(height, width) < tile:
        raise ValueError(f"tile: expected at most the sides of the image, {height} x {width}, got {tile}")
    corners = []
    for top in range(0, height, step):
        for left in range(0, width, step):
            y, x = min(top, height - tile), min(left, width - tile)
            corners.append((x, y, x + tile, y + tile))
    return np.array(corners, np.int64)


def merge_tiles(tiles: jax.Array, origins: np.ndarray, size: tuple[int, int]) -> jax.Array:
    """Mean of overlapping maps of tiles.

    Args:
      tiles: Maps ``[tiles, p, p]``.
      origins: From :func:`tile_origins`.
      size: Height and width of the image.

    Returns:
      ``[height, width]``.
    """
    side = tiles.shape[1]
    rows = jnp.asarray(origins[:, 1])[:, None, None] + jnp.arange(side)[None, :, None]
    columns = jnp.asarray(origins[:, 0])[:, None, None] + jnp.arange(side)[None, None, :]
    total = jnp.zeros(size, tiles.dtype).at[rows, columns].add(tiles)
    hits = jnp.zeros(size, tiles.dtype).at[rows, columns].add(jnp.ones_like(tiles))
    return total / hits


def _interpolate(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Linear interpolation along an axis with half-pixel centers; beyond the edge the edge."""
    old = x.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
    low = np.floor(at).astype(np.int32)
    shape = [1] * x.ndim
    shape[axis] = size
    share = jnp.asarray(at - low, x.dtype).reshape(shape)
    first, second = (jnp.take(x, i, axis=axis) for i in (low, np.minimum(low + 1, old - 1)))
    return first + share * (second - first)


def _grey_closing(x: jax.Array, side: int) -> jax.Array:
    window = (1, side, side)
    widened = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")
    return jax.lax.reduce_window(widened, jnp.inf, jax.lax.min, window, (1, 1, 1), "SAME")


def _blur(x: jax.Array, sigma: float, kernel_size: int | None) -> jax.Array:
    radius = int(4 * sigma + 0.5) if kernel_size is None else kernel_size // 2
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-np.square(offsets) / (2 * sigma**2))
    kernel /= kernel.sum()

    def along(x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis]
        mirrored = np.pad(np.arange(size), radius, mode="reflect") if size > 1 else np.zeros(2 * radius + 1, int)
        padded = jnp.take(x, mirrored, axis=axis)
        parts = (
            float(weight) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, weight in enumerate(kernel)
        )
        return functools.reduce(jnp.add, parts)

    return along(along(x, 1), 2)


def _otsu(x: jax.Array) -> jax.Array:
    """The threshold with the largest variance between what is below and what is above it."""
    low, high = jnp.min(x), jnp.max(x)
    scale = jnp.where(high > low, (high - low) / 255, 1)
    levels = jnp.round((x - low) / scale).astype(jnp.int32)
    counts = jnp.zeros(256, x.dtype).at[levels].add(1)
    level = jnp.arange(256, dtype=x.dtype)
    below, weighted = jnp.cumsum(counts), jnp.cumsum(counts * level)
    above = below[-1] - below
    gap = weighted / jnp.maximum(below, 1) - (weighted[-1] - weighted) / jnp.maximum(above, 1)
    between = jnp.where((below > 0) & (above > 0), below * above * jnp.square(gap), -1)
    return low + scale * (jnp.argmax(between).astype(x.dtype) + 0.5)
