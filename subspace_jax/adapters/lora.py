"""LoRA: a frozen weight and a low-rank update of it."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import kernels, nn
from subspace_jax.adapters.convolution import ConvLoRAWeight
from subspace_jax.adapters.factors import (
    adapted,
    check_setting,
    dropout_fields,
    dropped,
    factor_axes,
    keeps_base,
    remove,
    scale_fields,
    scale_of,
    start_adapter,
)
from subspace_jax.adapters.gradient_probes import probes_in
from subspace_jax.adapters.quantized import Int8Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAWeight:
    """A weight ``base + scale * a @ b`` that is never formed; takes a kernel's or a table's place.

    Attributes:
      base: Frozen ``[..., in, out]``.
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
      scales: ``[...]`` where stacked weights differ in their scale, otherwise None.
      key: Random key, ``[...]``, while training with dropout; None without.
      scale: The scale where they do not.
      row_energy: Energy probe ``[..., in]``, or None; see :func:`subspace_jax.adapters.add_energy_probes`.
      column_energy: Energy probe ``[..., out]``.
      dropout: Share of the entries of x that the update doesn't see, if there is a key.
    """

    base: jax.Array | Int8Weight
    a: jax.Array
    b: jax.Array
    scales: jax.Array | None = None
    row_energy: jax.Array | None = None
    column_energy: jax.Array | None = None
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    @property
    def factor(self) -> jax.Array | float:
        """The scale, whichever way it is kept."""
        return self.scale if self.scales is None else self.scales

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        y = self._lora(x, jax.lax.stop_gradient(self.base))
        if self.row_energy is None:
            return y
        return kernels.energy_probes(x, y, self.row_energy, self.column_energy)

    def _lora(self, x: jax.Array, base: jax.Array | Int8Weight) -> jax.Array:
        if self.key is None and not isinstance(base, Int8Weight):
            return kernels.lora_linear(x, base, self.a, self.b, self.factor)
        # The two branches see different inputs, or the base is no array: no one product makes both.
        update = nn.linear(nn.linear(dropped(x, self.key, self.dropout), self.a), self.b)
        return nn.linear(x, base) + self._scaled(update)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        rows = nn.embed(tokens, jax.lax.stop_gradient(self.base), dtype)
        return rows + self._scaled(jnp.matmul(nn.embed(tokens, self.a, dtype), self.b.astype(dtype)))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        update = nn.unembed(jnp.matmul(x, jnp.swapaxes(self.b, -1, -2).astype(x.dtype)), self.a)
        return nn.unembed(x, jax.lax.stop_gradient(self.base)) + self._scaled(update)

    def dense(self) -> jax.Array:
        """Returns the weight itself, in the dtype of ``base``."""
        return adapted(self.base, self.a, self.b, self.factor).astype(self.base.dtype)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.factor, x.dtype) * x


@dataclass(frozen=True)
class LoRA:
    """Low-rank update ``W + s a b`` with ``s = alpha / rank``.

    ``a [..., in, rank]`` and ``b [..., rank, out]`` are trained, the weight is not; leading axes are stacked weights.
    Of a table (a weight called ``embedding``) the side of the words begins at zero, of others ``b``.

    A convolution's kernel ``[..., *window, in / groups, out]`` gets ``a [..., *window, in / groups, rank]``, a
    convolution like its own, and ``b [..., rank / groups, out]``, one by a window of one.

    Source: arXiv 2106.09685; rsLoRA, arXiv 2312.03732; PiSSA, arXiv 2404.02948; LoRA-GA, arXiv 2407.05000.

    Attributes:
      rank: Rank of the update.  A tuple gives one for each layer of a stacked weight, zero for none: arrays then have
        the largest, filled up with zeros that get no gradient.
      alpha: Numerator of the scale; a tuple for one for each layer.
      rslora: Whether ``s = alpha / sqrt(rank)``.
      init: "kaiming" (``a`` uniform within ``1 / sqrt(in)``), "gaussian" (deviation ``1 / rank``), or "pissa": the
        leading singular triplets, which :func:`subspace_jax.adapters.prepare` then takes from the weight;
        "pissa_randomized" finds them by a random sketch, for large weights.  "lora_ga": singular vectors of a gradient
        that ``prepare`` is given, see :func:`subspace_jax.adapters.lora_ga_factors`.
      dropout: Share of the inputs that the update doesn't see while training: with a key for
        :func:`subspace_jax.adapters.bind`.  Tables have none, as in PEFT.
      window: Number of axes of a convolution's window, 0 for a matrix.
      groups: Those of the convolution; they divide the rank.

    Raises:
      ValueError: A rank is below 1, alpha is not positive, ``init`` is unknown, or another number is out of range.
    """

    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    rslora: bool = False
    init: str = "kaiming"
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
        return start_adapter(key, w, table, self, gradient)

    def bind(
        self, base: jax.Array, arrays: dict[str, jax.Array], key: jax.Array | None = None
    ) -> LoRAWeight | ConvLoRAWeight:
        """Puts the weight and its arrays together."""
        fields = {**scale_fields(self.scale, base), **dropout_fields(self.dropout, key, base, self.window)}
        if self.window:
            return ConvLoRAWeight(base, arrays["a"], arrays["b"], window=self.window, groups=self.groups, **fields)
        return LoRAWeight(base, arrays["a"], arrays["b"], **fields, **probes_in(arrays))

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Logical axes of the frozen part and of the trained arrays, from those of the weight."""
        return names, factor_axes(names, self.window)

    def unmerge(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: None) -> jax.Array:
        """Takes the update out of a merged weight."""
        del kept
        if self.window:
            return ConvLoRAWeight(
                merged, arrays["a"], arrays["b"], scale=-self.scale, window=self.window, groups=self.groups
            ).dense()
        return remove(merged, arrays["a"], arrays["b"], self.scale)
