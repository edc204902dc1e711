"""DoRA: a low-rank update, and a trained norm of each column."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import kernels, nn
from subspace_jax.adapters.config import AdapterConfig, Arrays, LowRankUpdate
from subspace_jax.adapters.convolution import ConvDoRAWeight, conv_norm, dense_kernel
from subspace_jax.adapters.factors import (
    adapted,
    column_norm,
    drop_features,
    dropout_fields,
    gain,
    remove,
    scale_fields,
)
from subspace_jax.adapters.gradient_probes import probes_in
from subspace_jax.adapters.lora import LoRA
from subspace_jax.adapters.structured import StructuredWeight, axes_of, is_structured


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoRAWeight(StructuredWeight):
    """A weight ``(base + scale * a @ b) diag(magnitude / norm)`` that is never formed.

    Attributes:
      base: Frozen ``[..., in, out]``.
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
      magnitude: ``[..., out]``.
      scales: ``[...]`` where stacked weights differ in their scale, otherwise None.
      row_energy: Gradient probe ``[..., in]``, or None; see :func:`subspace_jax.adapters.add_gradient_probes`.
      column_energy: Gradient probe ``[..., out]``.
      key: Random key of dropout, ``[...]``; None without.
      scale: The scale where stacked weights do not differ.
      dropout: Probability of dropping an input feature of the adapter, if there is a key.
      detach_norm: Whether the norm is a constant for derivatives.
    """

    base: jax.Array | StructuredWeight
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
        """The scale, of all stacked weights or of each."""
        return self.scale if self.scales is None else self.scales

    @property
    def norm(self) -> jax.Array:
        """Norms of the adapted columns, ``[..., out]``."""
        return column_norm(self.base, self.a, self.b, self.factor)

    @property
    def gain(self) -> jax.Array:
        """``magnitude / norm``, ``[..., out]``."""
        return gain(self.magnitude, self.norm, self.detach_norm, self.base.dtype)

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        y = self._dora(x, self.base)
        if self.row_energy is None:
            return y
        # The gradients of the factors are those at the weight before its columns are scaled.
        return kernels.energy_probes(x, y, self.row_energy, self.column_energy, self.gain)

    def _dora(self, x: jax.Array, base: jax.Array | StructuredWeight) -> jax.Array:
        seen = None if self.key is None else drop_features(x, self.key, self.dropout)
        if not is_structured(base):
            return kernels.dora_linear(
                x, base, self.a, self.b, self.magnitude, self.factor, dropped=seen, detach_norm=self.detach_norm
            )
        y = nn.linear(x, base)
        own, seen = (y, x) if seen is None else (nn.linear(seen, base), seen)
        return y + kernels.dora_compose(own, nn.linear(nn.linear(seen, self.a), self.b), self.gain, self.factor)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        base = nn.embed(tokens, self.base, dtype)
        update = jnp.matmul(nn.embed(tokens, self.a, dtype), self.b.astype(dtype))
        return kernels.dora_compose(base, update, self.gain, self.factor) + base

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        x = (x.astype(self.gain.dtype) * jnp.broadcast_to(self.gain, x.shape)).astype(x.dtype)
        update = nn.unembed(jnp.matmul(x, jnp.swapaxes(self.b, -1, -2).astype(x.dtype)), self.a)
        base = nn.unembed(x, self.base)
        return base + jnp.asarray(self.factor, x.dtype) * update

    def dense(self) -> jax.Array:
        """Returns the weight, in the dtype of ``base``."""
        direction = adapted(self.base, self.a, self.b, self.factor)
        return (direction * self.gain[..., None, :].astype(direction.dtype)).astype(self.base.dtype)


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation ``(W + s a b) diag(magnitude / norm)``.

    The trained ``magnitude [..., out]`` begins as the norms of the columns, so that the adapted weight begins as W.
    The norms of an embedding table run over the vocabulary, those of a convolution over window and inputs.

    Source: arXiv 2402.09353; computation from arXiv 2603.22276; dropout as in PEFT.

    Attributes:
      detach_norm: Whether the norm is a constant for derivatives, as in the published training.

    Other attributes: see :class:`LoRA`.  A layer of rank 0 ignores its magnitude, which gets no gradient; dropout is
    applied to the correction of the frozen branch too.

    Raises:
      ValueError: See :class:`LoRA`.
    """

    detach_norm: bool = True

    labels: ClassVar = {**LoRA.labels, "magnitude": "magnitude"}
    roles: ClassVar = {**LoRA.roles, "magnitude": "no_decay"}

    @property
    def method(self) -> str:
        """Name of the method."""
        return "DoRA"

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[jax.Array, Arrays]:
        """Draws ``a`` and ``b`` and computes the magnitudes; see :class:`AdapterConfig`."""
        base, arrays = super().initialize(key, w, table=table, gradient=gradient)
        # By the function that the layer uses: a norm that differs in its last bit changes the first output.
        fields = scale_fields(self.scale, base)
        scale = fields.get("scales", fields["scale"])
        # XLA's CPU compiler fuses a product with constant zeros into a wrong sum (JAX 0.10.2; 32 x 128 weights of
        # rank 4, for one).
        a, b = jax.lax.optimization_barrier((arrays["a"], arrays["b"]))
        if self.window:
            magnitude = conv_norm(base, a, b, scale, self.window, self.groups)
        else:
            magnitude = column_norm(base, a, b, scale)
        return base, {**arrays, "magnitude": magnitude}

    def bind(self, base: jax.Array, arrays: Arrays, key: jax.Array | None = None) -> DoRAWeight | ConvDoRAWeight:
        """Returns the adapted weight."""
        self.check_factors(arrays)
        arrays = {name: x.astype(jnp.float32) if _is_coarse(name, x) else x for name, x in arrays.items()}
        fields = {**scale_fields(self.scale, base), **dropout_fields(self.dropout, key, base, self.window)}
        parts = (base, arrays["a"], arrays["b"], self._magnitude(base, arrays))
        if self.window:
            fields |= {"window": self.window, "groups": self.groups}
            return ConvDoRAWeight(*parts, detach_norm=self.detach_norm, **fields)
        return DoRAWeight(*parts, detach_norm=self.detach_norm, **fields, **probes_in(arrays))

    def _magnitude(self, base, arrays):
        """The trained magnitudes; for layers of rank 0 the norms of the weight."""
        magnitude = arrays["magnitude"]
        if not isinstance(self.rank, tuple) or 0 not in self.rank or axes_of(base) is not None:
            return magnitude
        own = column_norm(base, *(jnp.zeros_like(arrays[name]) for name in "ab"), 0.0)
        return jnp.where(jnp.asarray(self.rank)[:, None] > 0, magnitude, own.astype(magnitude.dtype))

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Returns the logical axes of the frozen part, of the factors and of the magnitude."""
        lead = names[: len(names) - 2 - self.window]
        base, factors = super().axes(names)
        return base, {**factors, "magnitude": P(*lead, names[-1])}

    def merge_state(self, base: jax.Array, arrays: Arrays) -> jax.Array:
        """Returns ``magnitude / norm``."""
        return self.bind(base, arrays).gain

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: jax.Array) -> jax.Array:
        """Divides a merged weight by ``magnitude / norm``, and subtracts the update."""
        direction = merged.astype(kept.dtype) / jnp.expand_dims(kept, tuple(range(-2 - self.window, -1)))
        if self.window:
            back = dense_kernel(direction, arrays["a"], arrays["b"], -self.scale, self.window, self.groups)
        else:
            back = remove(direction, arrays["a"], arrays["b"], self.scale)
        return back.astype(merged.dtype)

    def low_rank_update(self, base: Any, arrays: Arrays) -> LowRankUpdate:
        """Returns ``a``, ``scale * b`` and ``magnitude / norm``."""
        update = super().low_rank_update(base, arrays)
        return update._replace(gain=self.bind(base, arrays).gain)

    @staticmethod
    def combine(
        configs: Sequence[AdapterConfig], arrays: Sequence[Arrays], weights: Sequence[ArrayLike]
    ) -> tuple[AdapterConfig, Arrays]:
        """Raises ValueError: DoRA is not linear in its arrays."""
        return AdapterConfig.combine(configs, arrays, weights)

    def peft_fields(self) -> dict[str, Any] | None:
        """Returns the fields that say which layer this is."""
        return {**super().peft_fields(), "use_dora": True}


def _is_coarse(name: str, x: jax.Array | P) -> bool:
    if isinstance(x, P):
        return False
    # The norms overflow in float16; bfloat16 has too few digits for a gain near 1.
    return x.dtype == jnp.float16 or (name == "magnitude" and x.dtype == jnp.bfloat16)
