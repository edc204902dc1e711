"""Rotary position embeddings in the half-split convention (Su et al., arXiv 2104.09864)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import working_dtype

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """The frequencies of rotary position embeddings.

    Attributes:
      theta: Base of the geometric series of frequencies.
      kind: "default"; "linear" divides every frequency by ``factor`` (arXiv 2306.15595); "llama3" divides low
        frequencies and interpolates between (arXiv 2407.21783, section 3.2).
      factor: Divisor of the frequencies.
      low_freq_factor: "llama3": wavelengths above ``original_length / low_freq_factor`` are scaled.
      high_freq_factor: "llama3": wavelengths below ``original_length / high_freq_factor`` are unchanged.
      original_length: "llama3": context length of pretraining.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope: kind {self.kind!r} is not supported; expected one of {ROPE_KINDS}")
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope: theta and factor are positive, got {self.theta} and {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope: expected 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}"
            )


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns the angle per position of each pair of features, in radians: ``[head_dim / 2]`` float32.

    Args:
      rope: The settings.
      head_dim: Width of a head, even.

    Raises:
      ValueError: ``head_dim`` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rope: head_dim is rotated in pairs; expected an even number, got {head_dim}")
    frequency = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        periods = rope.original_length * frequency / (2 * math.pi)
        # Weight of the unscaled frequency: 0 for low frequencies, 1 for high ones.
        keep = np.clip((periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        frequency = (1 - keep) * frequency / rope.factor + keep * frequency
    return frequency.astype(np.float32)


def rope_tables(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the angles, ``[batch, length, 1, head_dim / 2]`` float32.

    Args:
      rope: The settings.
      head_dim: Width of a head, even.
      positions: ``[batch, length]``, integers.
    """
    frequency = jnp.asarray(rope_frequencies(rope, head_dim)).reshape(1, 1, 1, -1)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair ``(x[j], x[j + head_dim / 2])`` by its angle, in at least float32.

    Args:
      x: ``[batch, length, heads, head_dim]``.
      tables: Cosine and sine from :func:`rope_tables`.

    Returns:
      The shape and dtype of ``x``.
    """
    cos, sin = (table.astype(working_dtype(x)) for table in tables)
    first, second = jnp.split(x.astype(working_dtype(x)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
