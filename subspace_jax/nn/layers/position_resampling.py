"""Learned position embeddings of a grid, resampled to a grid of another size."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import working_dtype


def resample_positions(pos: jax.Array, old: tuple[int, int], new: tuple[int, int], *, antialias: bool) -> jax.Array:
    """Resamples the rows of a grid of positions by bicubic interpolation with half-pixel centres.

    Two families of checkpoints differ here.  Without ``antialias`` the kernel is Keys' with a = -0.75 and is never
    widened, and what it asks for beyond the border is the row at the border (Hugging Face's ViT, DeiT, CLIP, SigLIP and
    DINOv2 without registers).  With it a = -0.5, the kernel is widened when the grid shrinks, and the weights of what
    lies beyond the border are given to the rest (timm, DINOv2 with registers); that is
    ``jax.image.resize(method="cubic", antialias=True)``.

    Args:
      pos: ``[..., k + old_h * old_w, d]``: ``k >= 0`` rows of other tokens, which stay as they are, then the grid, row
        by row.
      old: Height and width of the grid.
      new: Those wanted.
      antialias: Which of the two.

    Returns:
      ``[..., k + new_h * new_w, d]`` in the dtype of ``pos``, computed in float32 or wider; ``pos`` itself where the
      grid is already as wanted.

    Raises:
      ValueError: There are fewer rows than the old grid has, or a side is not positive.
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
    """The matrix ``[m, n]`` that takes ``n`` samples to ``m``."""
    stretch = max(n / m, 1.0) if antialias else 1.0
    centres = (np.arange(m) + 0.5) * (n / m) - 0.5
    reach = int(np.ceil(2 * stretch))
    taps = np.floor(centres)[:, None].astype(int) + np.arange(1 - reach, reach + 1)[None]
    weights = _keys((taps - centres[:, None]) / stretch, -0.5 if antialias else -0.75)
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
