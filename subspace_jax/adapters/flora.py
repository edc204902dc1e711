"""FLoRA: a low-rank Tucker update of a weight of any order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.config import AdapterConfig, Arrays, LowRankUpdate
from subspace_jax.adapters.factors import drop_features, dropout_fields, grouped_matmul, scaled
from subspace_jax.adapters.lora import LoRAWeight
from subspace_jax.adapters.quantized import as_matrix
from subspace_jax.adapters.structured import StructuredWeight, as_dense, axes_of

FLORA_INITS = ("kaiming_normal", "normal002", "kaiming_uniform")
MAX_ORDER = 9


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FLoRAWeight(StructuredWeight):
    """A weight ``base + scale * T`` where T is a core times a matrix along each axis, and is never formed.

    The axes of the core are ordered as in the authors' code: inputs, outputs, then those of a convolution's window; the
    weight has the window first.

    Attributes:
      base: Frozen ``[..., *window, in, out]``.
      core: ``[..., r_0, r_1, ...]``.
      factors: ``p0 [..., in, r_0]``, ``p1 [..., out, r_1]``, and ``p2 [..., window_0, r_2]`` and so on.
      key: Random key of dropout, ``[...]``; None without.
      scale: The scale.
      dropout: Probability of dropping an input feature of the update, if there is a key.
    """

    base: jax.Array | StructuredWeight
    core: jax.Array
    factors: Mapping[str, jax.Array]
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    @property
    def order(self) -> int:
        """Number of axes of the weight, without those of a stack."""
        return len(self.factors)

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        self._check(2, "linear")
        p0, p1 = self.factors["p0"], self.factors["p1"]
        # The core is multiplied into the side that leaves the smaller rank between the two matmuls.
        if self.core.shape[-1] < self.core.shape[-2]:
            return self._pair(linalg.times(p0, self.core), p1.mT).linear(x)
        return self._table().linear(x)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        self._check(2, "lookup")
        return self._table().lookup(tokens, dtype)

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        self._check(2, "scores")
        return self._table().scores(x)

    def conv(self, x: jax.Array, *, groups: int, **how) -> jax.Array:
        """Returns :func:`subspace_jax.nn.conv` of ``x`` with the adapted kernel.

        The update is three convolutions: 1x1 from the inputs to ``r_0``, with the window to ``r_1``, and 1x1 to the
        outputs.  With groups all groups share the core and ``p0``.
        """
        self._check(x.ndim, "conv")
        p0, p1, *window = (self.factors[name] for name in factor_names(self.order))
        small = jnp.moveaxis(linalg.tucker_product(self.core, window), (0, 1), (-2, -1))
        small = jnp.tile(small, (*(1,) * (x.ndim - 1), groups))
        seen = drop_features(x, self.key, self.dropout)
        inner = jnp.matmul(seen.reshape(*x.shape[:-1], groups, -1), p0.astype(x.dtype))
        inner = nn.conv(inner.reshape(*x.shape[:-1], -1), small, groups=groups, **how)
        base = nn.conv(x, self.base, groups=groups, **how)
        return base + jnp.asarray(self.scale, x.dtype) * grouped_matmul(inner, p1.T, groups)

    def update(self) -> jax.Array:
        """Returns what is added to the frozen weight, ``[..., *window, in, out]``, in float32 or better."""
        order = self.order
        tensor = linalg.tucker_product(self.core, [self.factors[name] for name in factor_names(order)])
        tensor = tensor if order < 3 else jnp.moveaxis(tensor, (-order, 1 - order), (-2, -1))
        return jnp.asarray(self.scale, tensor.dtype) * tensor

    def dense(self) -> jax.Array:
        """Returns the weight, in the dtype of ``base``."""
        base, update = as_dense(self.base), self.update()
        dtype = linalg.working_dtype(base, update)
        return (base.astype(dtype) + update.astype(dtype)).astype(self.base.dtype)

    def _table(self) -> LoRAWeight:
        p0, p1 = self.factors["p0"], self.factors["p1"]
        return self._pair(p0, linalg.times(self.core, p1.mT))

    def _pair(self, a, b) -> LoRAWeight:
        return LoRAWeight(self.base, a, b, key=self.key, scale=self.scale, dropout=self.dropout)

    def _check(self, order: int, name: str) -> None:
        if self.order != order:
            raise ValueError(f"{name}: expected a FLoRA weight of order {order}, got {self.order}: {self.base.shape}")


@dataclass(frozen=True)
class FLoRA(AdapterConfig):
    """Low-rank Tucker update: a small core, and a matrix for each axis, all trained.

    ``W + scale T`` with ``T[i, o, k...] = sum core[j_0, j_1, ...] p0[i, j_0] p1[o, j_1] p2[k, j_2] ...``.  The core
    begins at zero, so that the first step changes the core only.  The number of parameters is
    ``prod r_i + sum d_i r_i``.

    Matrices, embedding tables and convolutions are applied without forming the update; for weights of other orders use
    :func:`subspace_jax.adapters.materialize`.  Adapted vectors (one rank) are bound as arrays.

    Source: arXiv 2405.14739, which leaves order 1, groups and embedding tables open.

    Attributes:
      ranks: One for each axis, in the order inputs, outputs, window, as in the authors' code; their number is the order
        of the weight, and further leading axes are stacked weights.  With groups the first is of ``in / groups``.
      scale: Factor of the update; it is not divided by a rank.  The best value depends on the ranks, as the size of the
        factors does.
      init: Of the factors: "kaiming_normal" (variance ``0.5 / r_i``, the authors'), "normal002" (standard deviation
        0.02) or "kaiming_uniform" (within ``1 / sqrt(in)`` for inputs, ``1 / sqrt(r_i)`` otherwise).
      dropout: See :class:`LoRA`.

    Raises:
      ValueError: A rank is below 1, the scale is not positive, or another field is out of range.
    """

    ranks: tuple[int, ...]
    scale: float = 1.0
    init: str = "kaiming_normal"
    dropout: float = 0.0

    labels: ClassVar = {"core": "core", **{f"p{i}": "factor" for i in range(MAX_ORDER)}}
    roles: ClassVar = {"core": "no_decay"}

    def __post_init__(self):
        integers = isinstance(self.ranks, tuple) and all(
            isinstance(r, int) and not isinstance(r, bool) for r in self.ranks
        )
        if not integers or not 1 <= len(self.ranks) <= MAX_ORDER or min(self.ranks) < 1:
            raise ValueError(f"ranks: expected a tuple of one to nine integers of at least 1, got {self.ranks!r}")
        if not (isinstance(self.scale, float | int) and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: expected a positive number, got {self.scale!r}")
        if self.init not in FLORA_INITS:
            raise ValueError(f"init: expected one of {FLORA_INITS}, got {self.init!r}")
        if not (isinstance(self.dropout, float | int) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")

    @property
    def rank(self) -> tuple[int, ...]:
        """The ranks."""
        return self.ranks

    def admits(self, path: str, ndim: int) -> bool:
        """Admits vectors too, with one rank."""
        return len(self.ranks) == 1 or super().admits(path, ndim)

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[jax.Array, Arrays]:
        """Draws the factors for a weight ``[..., *window, in, out]``; see :class:`AdapterConfig`."""
        del table, gradient
        order = len(self.ranks)
        if w.ndim < order:
            raise ValueError(f"ranks: {order} of them, {self.ranks}, for a weight {w.shape}")
        lead, dtype = w.shape[: w.ndim - order], linalg.working_dtype(w)
        arrays = {"core": jnp.zeros((*lead, *self.ranks), dtype)}
        for i, (own, rank) in enumerate(zip(jax.random.split(key, order), self.ranks, strict=True)):
            size = w.shape[_axis(i, order)]
            if rank > size:
                raise ValueError(
                    f"ranks: expected 1 to {size} for axis {_axis(i, order)} of a weight {w.shape} "
                    f"(number {i} of {self.ranks}), got {rank}"
                )
            arrays[f"p{i}"] = self._draw(own, (*lead, size, rank), dtype, size if i == 0 else rank)
        return w, arrays

    def bind(self, base: jax.Array, arrays: Arrays, key: jax.Array | None = None) -> FLoRAWeight | jax.Array:
        """Returns the adapted weight."""
        order = len(self.ranks)
        factors = {name: arrays[name] for name in factor_names(order)}
        fields = dropout_fields(self.dropout, key, base, order - 2) if order > 1 else {}
        weight = FLoRAWeight(base, arrays["core"], factors, scale=self.scale, **fields)
        if order > 1:
            return weight
        return weight.dense() if axes_of(base) is None else base

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Returns the logical axes of the frozen part, of the core and of the factors."""
        order = len(self.ranks)
        lead = names[: len(names) - order]
        factors = {f"p{i}": P(*lead, names[_axis(i, order)], None) for i in range(order)}
        return names, {"core": P(*lead, *(None,) * order), **factors}

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: None) -> jax.Array:
        """Subtracts the update from a merged weight."""
        del kept
        factors = {name: arrays[name] for name in factor_names(len(self.ranks))}
        return FLoRAWeight(merged, arrays["core"], factors, scale=-self.scale).dense()

    def low_rank_update(self, base: jax.Array, arrays: Arrays) -> LowRankUpdate:
        """Returns factors between which is the smaller rank of a matrix, that of the outputs of a convolution."""
        del base
        order = len(self.ranks)
        if order < 2:
            raise ValueError(f"the update of a vector is not of low rank; got {self}")
        core, p0, p1, *window = (arrays[name] for name in ("core", *factor_names(order)))
        if order > 2 or self.ranks[1] < self.ranks[0]:
            tensor = linalg.tucker_product(core, [p0, jnp.eye(self.ranks[1], dtype=p0.dtype), *window])
            tensor = tensor if order < 3 else jnp.moveaxis(tensor, (-order, 1 - order), (-2, -1))
            a, b = as_matrix(tensor, order - 2), p1.mT
        else:
            a, b = p0, linalg.times(core, p1.mT)
        return LowRankUpdate(a, scaled(b, self.scale))

    def update_rank(self, arrays: Arrays) -> int:
        """Returns the smaller rank of a matrix, that of the outputs of a convolution."""
        del arrays
        return self.ranks[1] if len(self.ranks) > 2 else min(self.ranks)

    def _draw(self, key, shape, dtype, fan):
        if self.init == "kaiming_uniform":
            return jax.random.uniform(key, shape, dtype, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        deviation = 0.02 if self.init == "normal002" else math.sqrt(0.5 / shape[-1])
        return deviation * jax.random.normal(key, shape, dtype)


def factor_names(order: int) -> tuple[str, ...]:
    """Returns the names of the factors, in the order of the axes of the core."""
    return tuple(f"p{i}" for i in range(order))


def _axis(i: int, order: int) -> int:
    """Returns the axis of a weight ``[..., *window, in, out]`` of the i-th axis of the core."""
    if order == 1:
        return -1
    return (-2, -1)[i] if i < 2 else i - 2 - order
