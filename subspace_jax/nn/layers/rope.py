"""Rotary position embeddings in the half-split convention (Su et al., arXiv 2104.09864)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import working_dtype

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True)
class Rope:
    """The frequencies of rotary position embeddings.

    Attributes:
      theta: Base of the geometric series of frequencies.
      kind: "default"; "linear" divides every frequency by ``factor`` (arXiv 2306.15595); "llama3" divides low
        frequencies and interpolates between (arXiv 2407.21783, section 3.2); "yarn" does so by the index of the pair
        and scales scores (arXiv 2309.00071); "dynamic" raises ``theta`` with the length of a text where that exceeds
        ``original_length`` (dynamic NTK, described there too).
      factor: Divisor of the frequencies; of "dynamic", about the ratio of the longest text to ``original_length``.
      low_freq_factor: "llama3": wavelengths above ``original_length / low_freq_factor`` are scaled.
      high_freq_factor: "llama3": wavelengths below ``original_length / high_freq_factor`` are unchanged.
      original_length: "llama3", "yarn", "dynamic": context length of pretraining.
      beta_fast: "yarn": pairs that turn more often in ``original_length`` positions are unchanged.
      beta_slow: "yarn": pairs that turn less often are scaled.
      truncate: "yarn": whether the bounds between these pairs are rounded outwards to whole indices.
      attention_factor: "yarn": factor of cosine and sine, and so its square of the scores; ``0.1 log(factor) + 1`` by
        default.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

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
        if self.kind == "yarn" and not (self.theta > 1 and 0 < self.beta_slow < self.beta_fast):
            raise ValueError(
                f"rope: expected theta > 1 and 0 < beta_slow < beta_fast for yarn, got {self.theta}, {self.beta_slow} "
                f"and {self.beta_fast}"
            )
        if self.kind == "dynamic" and self.factor < 1:
            raise ValueError(f"rope: expected a factor of at least 1 for dynamic, got {self.factor}")
        if self.original_length < 1 or (self.attention_factor is not None and self.attention_factor <= 0):
            raise ValueError(
                f"rope: original_length and attention_factor are positive, got {self.original_length} and "
                f"{self.attention_factor}"
            )

    @property
    def magnitude(self) -> float:
        """The factor of cosine and sine."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(max(self.factor, 1)) + 1 if self.attention_factor is None else self.attention_factor


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns the angle per position of each pair of features, in radians: ``[head_dim / 2]`` float32.

    Those of kind "dynamic" are of texts up to ``rope.original_length``.

    Args:
      rope: The settings.
      head_dim: Width of a head, even; above 2 for "dynamic".

    Raises:
      ValueError: ``head_dim`` is odd, or 2 for "dynamic".
    """
    if head_dim % 2 or (rope.kind == "dynamic" and head_dim == 2):
        least = " above 2" if rope.kind == "dynamic" else ""
        raise ValueError(f"rope: head_dim is rotated in pairs; expected an even number{least}, got {head_dim}")
    frequency = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        periods = rope.original_length * frequency / (2 * math.pi)
        # Weight of the unscaled frequency: 0 for low frequencies, 1 for high ones.
        keep = np.clip((periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        frequency = (1 - keep) * frequency / rope.factor + keep * frequency
    elif rope.kind == "yarn":
        keep = 1 - _yarn_ramp(rope, head_dim)
        frequency = (1 - keep) * frequency / rope.factor + keep * frequency
    return frequency.astype(np.float32)


def _yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
    """Returns the weight of the scaled frequencies, ``[head_dim / 2]``."""

    def index(turns: float) -> float:
        # Of the pair, as a real number, that turns so often in original_length positions.
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


def rope_tables(
    rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the angles, ``[batch, length, 1, head_dim / 2]`` float32.

    Args:
      rope: The settings.
      head_dim: Width of a head, even.
      positions: ``[batch, length]``, integers.
      lengths: For "dynamic": length of the text of each token, ``[batch or 1, length or 1]`` integers; by default one
        more than the largest position of each row.
    """
    frequency = jnp.asarray(rope_frequencies(rope, head_dim)).reshape(1, 1, 1, -1)
    if rope.kind == "dynamic":
        if lengths is None:
            lengths = 1 + jnp.max(positions, axis=1, keepdims=True)
        ratio = jnp.maximum(lengths.astype(jnp.float32) / rope.original_length, 1)[:, :, None, None]
        power = np.arange(0, head_dim, 2, dtype=np.float32) / (head_dim - 2)
        # The highest frequency stays, the lowest is divided by about factor * ratio.
        frequency = frequency * jnp.power(rope.factor * ratio - (rope.factor - 1), -power.reshape(1, 1, 1, -1))
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angle) * rope.magnitude, jnp.sin(angle) * rope.magnitude


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
