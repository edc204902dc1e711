"""DoRA: a low-rank update whose columns are brought to trained lengths."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import kernels, nn
from subspace_jax.adapters.convolution import ConvDoRAWeight, conv_norm, formed
from subspace_jax.adapters.factors import (
    adapted,
    check_setting,
    column_norm,
    dropout_fields,
    dropped,
    factor_axes,
    gain,
    keeps_base,
    remove,
    scale_fields,
    scale_of,
    start_adapter,
)
from subspace_jax.adapters.gradient_probes import probes_in
from subspace_jax.adapters.quantized import Int8Weight, names_of


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
      key: Random key, ``[...]``, while training with dropout; None without.
      scale: The scale where they do not.
      row_energy: Energy probe ``[..., in]``, or None; see :func:`subspace_jax.adapters.add_energy_probes`.
      column_energy: Energy probe ``[..., out]``.
      dropout: Share of the entries of x that the adapter doesn't see, if there is a key.
      detach_norm: Whether the norm is a constant for derivatives.
    """

    base: jax.Array | Int8Weight
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    scales: jax.Array | None = None
    row_energy: jax.Array | None = None
    column_energy: jax.Array | None = None
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    detach_norm: bool = field(default=True, metadata={"static": True})

    @property
    def factor(self) -> jax.Array | float:
        """The scale, whichever way it is kept."""
        return self.scale if self.scales is None else self.scales

    @property
    def norm(self) -> jax.Array:
        """Norms of the adapted columns, ``[..., out]``."""
        return column_norm(jax.lax.stop_gradient(self.base), self.a, self.b, self.factor)

    @property
    def gain(self) -> jax.Array:
        """``magnitude / norm``, ``[..., out]``."""
        return gain(self.magnitude, self.norm, self.detach_norm, self.base.dtype)

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        base = jax.lax.stop_gradient(self.base)
        y = self._dora(x, base)
        if self.row_energy is None:
            return y
        # The factors' gradients are those at the weight before it is brought to its lengths.
        return kernels.energy_probes(x, y, self.row_energy, self.column_energy, self.gain)

    def _dora(self, x: jax.Array, base: jax.Array | Int8Weight) -> jax.Array:
        seen = None if self.key is None else dropped(x, self.key, self.dropout)
        if not isinstance(base, Int8Weight):
            return kernels.dora_linear(
                x, base, self.a, self.b, self.magnitude, self.factor, dropped=seen, detach_norm=self.detach_norm
            )
        y = nn.linear(x, base)
        own, seen = (y, x) if seen is None else (nn.linear(seen, base), seen)
        return y + kernels.dora_compose(own, nn.linear(nn.linear(seen, self.a), self.b), self.gain, self.factor)

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

    The trained ``magnitude [..., out]`` begins as the norm of the columns, so that the start changes nothing.  Of a
    table these run over the words, of a convolution over window and inputs.  The rest is as in :class:`LoRA`.

    Source: arXiv 2402.09353; arXiv 2603.22276 for how it is computed; dropout as in PEFT.

    Attributes:
      rank: See :class:`LoRA`; of a layer with rank zero the magnitude is passed over, too, and gets no gradient.
      alpha: See :class:`LoRA`.
      rslora: See :class:`LoRA`.
      init: See :class:`LoRA`.
      detach_norm: Whether the norm is a constant for derivatives, as in the published training.
      dropout: See :class:`LoRA`; the correction of the frozen part doesn't see the entries either.
      window: See :class:`LoRA`.
      groups: See :class:`LoRA`.

    Raises:
      ValueError: As :class:`LoRA`.
    """

    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    rslora: bool = False
    init: str = "kaiming"
    detach_norm: bool = True
    dropout: float = 0.0
    window: int = 0
    groups: int = 1

    def __post_init__(self):
        check_setting(self)

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The scale s, a tuple where layers differ."""
        return scale_of(self.rank, self.alpha, self.rslora)

    @property
    def keeps_base(self) -> bool:
        """Whether the start leaves the frozen weight as it is."""
        return keeps_base(self)

    def start(
        self, key: jax.Array, w: jax.Array, table: bool, gradient: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Draws the trained arrays for a weight ``[..., in, out]``; returns the frozen part with them."""
        base, arrays = start_adapter(key, w, table, self, gradient)
        # By the function that the layer uses: a norm that differs in its last bit would move the first output.
        fields = scale_fields(self.scale, base)
        scale = fields.get("scales", fields["scale"])
        # Of a product with zeros that it knows of, fused into a sum, a CPU's compiler makes garbage (JAX 0.10.2; 32 x
        # 128 weights of rank 4, for one).
        a, b = jax.lax.optimization_barrier((arrays["a"], arrays["b"]))
        if self.window:
            magnitude = conv_norm(base, a, b, scale, self.window, self.groups)
        else:
            magnitude = column_norm(base, a, b, scale)
        return base, {**arrays, "magnitude": magnitude}

    def bind(
        self, base: jax.Array, arrays: dict[str, jax.Array], key: jax.Array | None = None
    ) -> DoRAWeight | ConvDoRAWeight:
        """Puts the weight and its arrays together."""
        arrays = {name: x.astype(jnp.float32) if _is_coarse(name, x) else x for name, x in arrays.items()}
        fields = {**scale_fields(self.scale, base), **dropout_fields(self.dropout, key, base, self.window)}
        parts = (base, arrays["a"], arrays["b"], self._magnitude(base, arrays))
        if self.window:
            fields |= {"window": self.window, "groups": self.groups}
            return ConvDoRAWeight(*parts, detach_norm=self.detach_norm, **fields)
        return DoRAWeight(*parts, detach_norm=self.detach_norm, **fields, **probes_in(arrays))

    def _magnitude(self, base, arrays):
        """The trained lengths, and of layers without an adapter those that they have."""
        magnitude = arrays["magnitude"]
        if not isinstance(self.rank, tuple) or 0 not in self.rank or names_of(base) is not None:
            return magnitude
        base = jax.lax.stop_gradient(base)
        own = column_norm(base, *(jnp.zeros_like(arrays[name]) for name in "ab"), 0.0)
        return jnp.where(jnp.asarray(self.rank)[:, None] > 0, magnitude, own.astype(magnitude.dtype))

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Logical axes of the frozen part and of the trained arrays, from those of the weight."""
        lead = names[: len(names) - 2 - self.window]
        return names, {**factor_axes(names, self.window), "magnitude": P(*lead, names[-1])}

    def unmerge(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: jax.Array) -> jax.Array:
        """Takes the update out of a merged weight; ``kept`` is ``magnitude / norm`` as it was when merging."""
        direction = merged.astype(kept.dtype) / jnp.expand_dims(kept, tuple(range(-2 - self.window, -1)))
        if self.window:
            back = formed(direction, arrays["a"], arrays["b"], -self.scale, self.window, self.groups)
        else:
            back = remove(direction, arrays["a"], arrays["b"], self.scale)
        return back.astype(merged.dtype)


def _is_coarse(name: str, x: jax.Array | P) -> bool:
    if isinstance(x, P):
        return False
    # Float16 has no room for norms and what they are made of, bfloat16 no digits for a gain near 1.
    return x.dtype == jnp.float16 or (name == "magnitude" and x.dtype == jnp.bfloat16)
