"""DoRA: a low-rank update whose columns are brought to trained lengths."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import kernels, nn
from subspace_jax.adapters.energies import probes_in
from subspace_jax.adapters.lora import (
    INITS,
    adapted,
    check_rank_alpha,
    factor_axes,
    remove,
    scale_fields,
    scale_of,
    start_factors,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoRAWeight:
    """A weight ``(base + scale * a @ b) diag(magnitude / norm)`` that is never formed.

    Attributes:
      base: Frozen ``[..., in, out]``.
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
      magnitude: ``[..., out]``.
      scales: ``[...]`` where stacked weights differ in their scale, otherwise None.
      scale: The scale where they do not.
      row_energy: Energy probe ``[..., in]``, or None; see :func:`subspace_jax.adapters.add_energy_probes`.
      column_energy: Energy probe ``[..., out]``.
      detach_norm: Whether the norm is a constant for derivatives.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    scales: jax.Array | None = None
    row_energy: jax.Array | None = None
    column_energy: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    detach_norm: bool = field(default=True, metadata={"static": True})

    @property
    def factor(self) -> jax.Array | float:
        """The scale, whichever way it is kept."""
        return self.scale if self.scales is None else self.scales

    @property
    def norm(self) -> jax.Array:
        """Norms of the adapted columns, ``[..., out]``."""
        norm = _norm(jax.lax.stop_gradient(self.base), self.a, self.b, self.factor)
        return jax.lax.stop_gradient(norm) if self.detach_norm else norm

    @property
    def gain(self) -> jax.Array:
        """``magnitude / norm``, ``[..., out]``."""
        norm = self.norm
        least = 1e-6 if self.base.dtype == jnp.bfloat16 else 1e-12
        return self.magnitude.astype(norm.dtype) / jnp.maximum(norm, least)

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        base = jax.lax.stop_gradient(self.base)
        y = kernels.dora_linear(x, base, self.a, self.b, self.magnitude, self.factor, detach_norm=self.detach_norm)
        if self.row_energy is None:
            return y
        # The factors' gradients are those at the weight before it is brought to its lengths.
        return kernels.energy_probes(x, y, self.row_energy, self.column_energy, self.gain)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        base = nn.embed(tokens, jax.lax.stop_gradient(self.base), dtype)
        update = jnp.matmul(nn.embed(tokens, self.a, dtype), self.b.astype(dtype))
        return kernels.dora_compose(base, update, self.gain, self.factor) + base

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        x = (x.astype(self.gain.dtype) * jnp.broadcast_to(self.gain, x.shape)).astype(x.dtype)
        update = nn.unembed(jnp.matmul(x, jnp.swapaxes(self.b, -1, -2).astype(x.dtype)), self.a)
        base = nn.unembed(x, jax.lax.stop_gradient(self.base))
        return base + jnp.asarray(self.factor, x.dtype) * update

    def dense(self) -> jax.Array:
        """Returns the weight itself, in the dtype of ``base``."""
        direction = adapted(self.base, self.a, self.b, self.factor)
        return (direction * self.gain[..., None, :].astype(direction.dtype)).astype(self.base.dtype)


@dataclass(frozen=True)
class DoRA:
    """Weight-decomposed update ``(W + s a b) diag(magnitude / norm)``.

    The trained ``magnitude [..., out]`` begins as the norm of the columns, so that the start changes nothing.  The rest
    is as in :class:`LoRA`.

    Source: arXiv 2402.09353; arXiv 2603.22276 for how it is computed.

    Attributes:
      rank: See :class:`LoRA`.
      alpha: See :class:`LoRA`.
      rslora: See :class:`LoRA`.
      init: See :class:`LoRA`.
      detach_norm: Whether the norm is a constant for derivatives, as in the published training.

    Raises:
      ValueError: As :class:`LoRA`, or a layer has rank zero: its magnitude would still be trained.
    """

    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    rslora: bool = False
    init: str = "kaiming"
    detach_norm: bool = True

    def __post_init__(self):
        check_rank_alpha(self.rank, self.alpha)
        if isinstance(self.rank, tuple) and 0 in self.rank:
            raise ValueError(f"rank: DoRA needs at least 1 in every layer, got {self.rank}")
        if self.init not in INITS:
            raise ValueError(f"init: expected one of {INITS}, got {self.init!r}")
        if self.init.startswith("pissa") and isinstance(self.rank, tuple):
            raise ValueError(f"init: {self.init!r} takes one rank for all layers, got {self.rank}")

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The scale s, a tuple where layers differ."""
        return scale_of(self.rank, self.alpha, self.rslora)

    @property
    def keeps_base(self) -> bool:
        """Whether the start leaves the frozen weight as it is."""
        return not self.init.startswith("pissa")

    def start(self, key: jax.Array, w: jax.Array, table: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Draws the trained arrays for a weight ``[..., in, out]``; returns the frozen part with them."""
        base, arrays = start_factors(key, w, table, self)
        # By the function that the layer uses: a norm that differs in its last bit would move the first output.
        fields = scale_fields(self.scale, base)
        magnitude = _norm(base, arrays["a"], arrays["b"], fields.get("scales", fields["scale"]))
        return base, {**arrays, "magnitude": magnitude}

    def bind(self, base: jax.Array, arrays: dict[str, jax.Array]) -> DoRAWeight:
        """Puts the weight and its arrays together."""
        fields = scale_fields(self.scale, base) | probes_in(arrays)
        return DoRAWeight(base, arrays["a"], arrays["b"], arrays["magnitude"], detach_norm=self.detach_norm, **fields)

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Logical axes of the frozen part and of the trained arrays, from those of the weight."""
        *lead, _, columns = names
        return names, {**factor_axes(names), "magnitude": P(*lead, columns)}

    def undo(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: jax.Array) -> jax.Array:
        """Takes the update out of a merged weight; ``kept`` is ``magnitude / norm`` as it was when merging."""
        dtype = kept.dtype
        direction = merged.astype(dtype) / kept[..., None, :]
        return remove(direction, arrays["a"], arrays["b"], self.scale).astype(merged.dtype)


def _norm(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Norms of stacked weights, one at a time, as a scan over layers has them."""
    if jnp.ndim(scale) == 0 and w.ndim == 2:
        return kernels.dora_weight_norm(w, a, b, scale)
    if jnp.ndim(scale) == 0:
        return jax.lax.map(lambda xs: _norm(*xs, scale), (w, a, b))
    return jax.lax.map(lambda xs: _norm(*xs), (w, a, b, scale))
