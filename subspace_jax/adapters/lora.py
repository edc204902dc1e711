"""LoRA: a frozen weight and a low-rank update of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import kernels, nn
from subspace_jax.adapters.config import AdapterConfig, Arrays, LowRankUpdate
from subspace_jax.adapters.convolution import ConvLoRAWeight, dense_kernel
from subspace_jax.adapters.factors import (
    adapted,
    drop_features,
    dropout_fields,
    factor_axes,
    remove,
    scale_fields,
    scaled,
)
from subspace_jax.adapters.gradient_probes import PROBES, probes_in
from subspace_jax.adapters.lora_init import INITS, ZERO_UPDATE, init_adapter
from subspace_jax.adapters.quantized import as_matrix
from subspace_jax.adapters.structured import StructuredWeight, is_structured

_PROBE_LABELS = dict.fromkeys(PROBES, "factor")
_PROBE_ROLES = dict.fromkeys(PROBES, "probe")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAWeight(StructuredWeight):
    """A weight ``base + scale * a @ b`` that is never formed; replaces a kernel or an embedding table.

    Attributes:
      base: Frozen ``[..., in, out]``.
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
      scales: ``[...]`` where stacked weights differ in their scale, otherwise None.
      row_energy: Gradient probe ``[..., in]``, or None; see :func:`subspace_jax.adapters.add_gradient_probes`.
      column_energy: Gradient probe ``[..., out]``.
      key: Random key of dropout, ``[...]``; None without.
      scale: The scale where stacked weights do not differ.
      dropout: Probability of dropping an input feature of the update, if there is a key.
    """

    base: jax.Array | StructuredWeight
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
        """The scale, of all stacked weights or of each."""
        return self.scale if self.scales is None else self.scales

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        y = self._lora(x, self.base)
        if self.row_energy is None:
            return y
        return kernels.energy_probes(x, y, self.row_energy, self.column_energy)

    def _lora(self, x: jax.Array, base: jax.Array | StructuredWeight) -> jax.Array:
        if self.key is None and not is_structured(base):
            return kernels.lora_linear(x, base, self.a, self.b, self.factor)
        # The two branches have different inputs, or the base is no array: the fused kernel does not apply.
        update = nn.linear(nn.linear(drop_features(x, self.key, self.dropout), self.a), self.b)
        return nn.linear(x, base) + self._scaled(update)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        rows = nn.embed(tokens, self.base, dtype)
        return rows + self._scaled(jnp.matmul(nn.embed(tokens, self.a, dtype), self.b.astype(dtype)))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        update = nn.unembed(jnp.matmul(x, jnp.swapaxes(self.b, -1, -2).astype(x.dtype)), self.a)
        return nn.unembed(x, self.base) + self._scaled(update)

    def dense(self) -> jax.Array:
        """Returns the weight, in the dtype of ``base``."""
        return adapted(self.base, self.a, self.b, self.factor).astype(self.base.dtype)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.factor, x.dtype) * x


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """Low-rank adaptation ``W + s a b`` with ``s = alpha / rank``.

    ``a [..., in, rank]`` and ``b [..., rank, out]`` train, the weight is frozen; leading axes are stacked weights.  The
    update begins at zero: ``b`` does, or ``a`` for an embedding table (a weight called ``embedding``).

    A convolution's kernel ``[..., *window, in / groups, out]`` gets ``a [..., *window, in / groups, rank]``, a
    convolution of the same window, and ``b [..., rank / groups, out]``, a 1x1 convolution.

    Source: arXiv 2106.09685; rsLoRA, arXiv 2312.03732; PiSSA, arXiv 2404.02948; LoRA-GA, arXiv 2407.05000.

    Attributes:
      rank: Rank of the update.  A tuple has one for each layer of a stacked weight, 0 for none: the arrays have the
        largest rank, padded with zeros that get no gradient.
      alpha: Numerator of the scale; a tuple has one for each layer.
      rslora: Whether ``s = alpha / sqrt(rank)``.
      init: "kaiming" (``a`` uniform within ``1 / sqrt(in)``), "gaussian" (standard deviation ``1 / rank``), or
        "pissa": the leading singular triplets, which :func:`subspace_jax.adapters.prepare` then subtracts from the
        weight; "pissa_randomized" computes them by a randomized SVD, for large weights.  "lora_ga": singular vectors of
        a gradient that ``prepare`` takes, see :func:`subspace_jax.adapters.lora_ga_factors`.
      dropout: Probability of dropping an input feature of the update in training, with a key for
        :func:`subspace_jax.adapters.bind`.  Embedding tables have none, as in PEFT.
      window: Number of axes of a convolution's window, 0 for a matrix.
      groups: Number of groups of the convolution; divides the rank.

    Raises:
      ValueError: A rank is below 1, alpha is not positive, ``init`` is unknown, or another field is out of range.
    """

    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    rslora: bool = False
    init: str = "kaiming"
    dropout: float = 0.0
    window: int = 0
    groups: int = 1

    labels: ClassVar = {"a": "factor", "b": "factor", **_PROBE_LABELS}
    roles: ClassVar = _PROBE_ROLES

    def __post_init__(self):
        _check_rank_alpha(self.rank, self.alpha)
        if self.init not in INITS:
            raise ValueError(f"init: expected one of {INITS}, got {self.init!r}")
        by_layer = isinstance(self.rank, tuple) or isinstance(self.alpha, tuple)
        if isinstance(self.rank, tuple) and not self.keeps_base:
            raise ValueError(f"init: {self.init!r} takes one rank for all layers, got {self.rank}")
        if not (isinstance(self.dropout, float | int) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")
        if self.window not in (0, 1, 2, 3) or (self.window and by_layer):
            raise ValueError(f"window: expected 0 to 3 axes, and one rank and alpha with any, got {self}")
        if not isinstance(self.groups, int) or self.groups < 1 or (self.groups > 1 and not self.window):
            raise ValueError(f"groups: expected at least 1, and more for convolutions only, got {self.groups!r}")
        if self.groups > 1 and (self.rank % self.groups or not self.keeps_base):
            raise ValueError(f"groups: expected to divide the rank, and no {self.init!r}, got {self}")

    @property
    def method(self) -> str:
        """Name of the method."""
        return "rsLoRA" if self.rslora else "LoRA"

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The scale s; a tuple where layers differ."""
        ranks, alphas = ((x,) if not isinstance(x, tuple) else x for x in (self.rank, self.alpha))
        layers = max(len(ranks), len(alphas))
        ranks, alphas = (x * layers if len(x) == 1 else x for x in (ranks, alphas))
        scales = tuple(
            0.0 if r == 0 else a / (math.sqrt(r) if self.rslora else r) for r, a in zip(ranks, alphas, strict=True)
        )
        return scales[0] if len(set(scales)) == 1 else scales

    @property
    def keeps_base(self) -> bool:
        """Whether the update begins at zero."""
        return self.init in ZERO_UPDATE

    @property
    def changes_base(self) -> bool:
        """Whether the frozen part is the weight less the update of the start."""
        return not self.keeps_base

    @property
    def per_example(self) -> bool:
        """Whether the weight is no convolution."""
        return not self.window

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[jax.Array, Arrays]:
        """Draws ``a`` and ``b``; see :class:`AdapterConfig`."""
        return init_adapter(key, w, self, table=table, gradient=gradient)

    def bind(self, base: jax.Array, arrays: Arrays, key: jax.Array | None = None) -> LoRAWeight | ConvLoRAWeight:
        """Returns the adapted weight."""
        self.check_factors(arrays)
        fields = {**scale_fields(self.scale, base), **dropout_fields(self.dropout, key, base, self.window)}
        if self.window:
            return ConvLoRAWeight(base, arrays["a"], arrays["b"], window=self.window, groups=self.groups, **fields)
        return LoRAWeight(base, arrays["a"], arrays["b"], **fields, **probes_in(arrays))

    def check_factors(self, arrays: Arrays) -> None:
        """Raises ValueError for factors of another rank, whose scale would be a wrong one."""
        rank = max(self.rank) if isinstance(self.rank, tuple) else self.rank
        found = getattr(arrays["a"], "shape", (rank,))[-1]  # logical axes have no shape
        if found != rank:
            raise ValueError(f"trainable: expected factors of rank {rank}, as the settings say, got {found}")

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Returns the logical axes of the frozen part and of the factors, whose rank is called "rank"."""
        return names, factor_axes(names, self.window)

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: None = None) -> jax.Array:
        """Subtracts the update from a merged weight."""
        del kept
        a, b = arrays["a"], arrays["b"]
        if self.window:
            return dense_kernel(merged, a, b, -self.scale, self.window, self.groups).astype(merged.dtype)
        return remove(merged, a, b, self.scale)

    def start_state(self, base: jax.Array, arrays: Arrays) -> Arrays:
        """Returns the arrays at the start, where the frozen part is the weight less their product."""
        del base
        return {} if self.keeps_base else dict(arrays)

    def restore_base(self, w: jax.Array, start: Arrays) -> jax.Array:
        """Subtracts the update of the start."""
        return w if self.keeps_base else LoRA.unmerge(self, w, start)

    def low_rank_update(self, base: Any, arrays: Arrays) -> LowRankUpdate:
        """Returns ``a`` and ``scale * b``."""
        del base
        if self.groups > 1:
            raise ValueError(f"the update of a grouped convolution is not of low rank; got {self}")
        self.check_factors(arrays)
        return LowRankUpdate(as_matrix(arrays["a"], self.window), scaled(arrays["b"], self.scale))

    @staticmethod
    def combine(
        configs: Sequence[AdapterConfig], arrays: Sequence[Arrays], weights: Sequence[ArrayLike]
    ) -> tuple[AdapterConfig, Arrays]:
        """Concatenates the factors along the rank; the scales and the weights go into ``b``."""
        windows = {(config.window, config.groups) for config in configs}
        if len(windows) > 1:
            raise ValueError(f"convolutions of different windows or groups can't be added up; got {list(configs)}")
        [(window, groups)] = windows
        if groups > 1:
            raise ValueError("updates of grouped convolutions can't be added up")
        each = zip(configs, arrays, weights, strict=True)
        b = [jnp.asarray(w, own["b"].dtype) * scaled(own["b"], config.scale) for config, own, w in each]
        made = {"a": jnp.concatenate([own["a"] for own in arrays], -1), "b": jnp.concatenate(b, -2)}
        rank = made["a"].shape[-1]
        return LoRA(rank, float(rank), window=window), made

    def peft_fields(self) -> dict[str, Any] | None:
        """Returns the fields that say which layer this is; rank and alpha go by module."""
        return {"use_dora": False, "use_rslora": self.rslora, "lora_dropout": self.dropout}


def _check_rank_alpha(rank, alpha) -> None:
    """Raises unless rank and alpha are positive numbers, or tuples of one length."""
    ranks = rank if isinstance(rank, tuple) else (rank,)
    integers = all(isinstance(r, int) and not isinstance(r, bool) for r in ranks)
    if not integers or min(ranks, default=0) < 0 or not any(ranks):
        raise ValueError(f"rank: expected an integer of at least 1, or a tuple of them, got {rank!r}")
    if not isinstance(rank, tuple) and rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    alphas = alpha if isinstance(alpha, tuple) else (alpha,)
    if not alphas or not all(isinstance(a, int | float) and math.isfinite(a) and a > 0 for a in alphas):
        raise ValueError(f"alpha: expected a positive number, or a tuple of them, got {alpha!r}")
    if isinstance(rank, tuple) and isinstance(alpha, tuple) and len(rank) != len(alpha):
        raise ValueError(f"rank, alpha: expected one of each for every layer, got {len(rank)} and {len(alpha)}")
