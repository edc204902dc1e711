"""Resampling of learned position embeddings to a grid of another size."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import working_dtype


def resample_positions(pos: jax.Array, old: tuple[int, int], new: tuple[int, int], *, antialias: bool) -> jax.Array:
    """Resamples a grid of position embeddings by bicubic interpolation with half-pixel centers.

    Without ``antialias`` the kernel is Keys' with a = -0.75, never widened, and the border is replicated (Hugging
    Face's ViT, DeiT, CLIP, SigLIP and DINOv2 without registers).  With it a = -0.5, the kernel is widened when the grid
    shrinks, and weights outside the grid are dropped and the rest renormalized (timm, DINOv2 with registers), as in
    ``jax.image.resize(method="cubic", antialias=True)``.

    Args:
      pos: ``[..., k + old_h * old_w, d]``: ``k >= 0`` embeddings of other tokens, which are unchanged, then the grid,
        row by row.
      old: Height and width of the grid.
      new: Height and width of the new grid.
      antialias: Which of the two variants.

    Returns:
      ``[..., k + new_h * new_w, d]`` in the dtype of ``pos``, computed in at least float32; ``pos`` itself where the
      grids are equal.

    Raises:
      ValueError: There are fewer embeddings than grid positions, or a side is not positive.
    """
    if min(*old, *new) < 1:
        raise ValueError(f"resample_positions: expected grids with positive sides, got {old} and {new}")
    others = pos.shape[-2] - old[0] * old[1]
    if others < 0:
        raise ValueError(f"pos: a grid of {old[0]} x {old[1]} needs {old[0] * old[1]} rows, got {pos.shape[-2]}")
    if tuple(old) == tuple(new):
        return pos
    dtype = working_dtype(pos)
    rows, columns = (jnp.asarray(_weights(n, m, antialias), dtype) for n, m in zip(old, new, strict=True))
    grid = pos[..., others:, :].astype(dtype).reshape(*pos.shape[:-2], *old, pos.shape[-1])
    exact = jax.lax.Precision.HIGHEST
    grid = jnp.einsum("...hwd,kh->...kwd", grid, rows, precision=exact)
    grid = jnp.einsum("...kwd,lw->...kld", grid, columns, precision=exact)
    grid = grid.reshape(*pos.shape[:-2], new[0] * new[1], pos.shape[-1]).astype(pos.dtype)
    return jnp.concatenate([pos[..., :others, :], grid], axis=-2)


def _weights(n: int, m: int, antialias: bool) -> np.ndarray:
    """Returns the matrix ``[m, n]`` that resamples ``n`` values to ``m``."""
    stretch = max(n / m, 1.0) if antialias else 1.0
    centers = (np.arange(m) + 0.5) * (n / m) - 0.5
    reach = int(np.ceil(2 * stretch))
    taps = np.floor(centers)[:, None].astype(int) + np.arange(1 - reach, reach + 1)[None]
    weights = _keys((taps - centers[:, None]) / stretch, -0.5 if antialias else -0.75)
    if antialias:
        weights = np.where((taps >= 0) & (taps < n), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m)[:, None], np.clip(taps, 0, n - 1)), weights)
    return matrix


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
