"""LoRA: a frozen weight and a low-rank update of it."""

import math
import warnings
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import kernels, linalg, nn
from subspace_jax.adapters.energies import probes_in

INITS = ("kaiming", "gaussian", "pissa", "pissa_randomized")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAWeight:
    """A weight ``base + scale * a @ b`` that is never formed; takes a kernel's or a table's place.

    Attributes:
      base: Frozen ``[..., in, out]``.
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
      scales: ``[...]`` where stacked weights differ in their scale, otherwise None.
      scale: The scale where they do not.
      row_energy: Energy probe ``[..., in]``, or None; see :func:`subspace_jax.adapters.add_energy_probes`.
      column_energy: Energy probe ``[..., out]``.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scales: jax.Array | None = None
    row_energy: jax.Array | None = None
    column_energy: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})

    @property
    def factor(self) -> jax.Array | float:
        """The scale, whichever way it is kept."""
        return self.scale if self.scales is None else self.scales

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        y = kernels.lora_linear(x, jax.lax.stop_gradient(self.base), self.a, self.b, self.factor)
        if self.row_energy is None:
            return y
        return kernels.energy_probes(x, y, self.row_energy, self.column_energy)

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


def adapted(w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Forms ``w + scale * a @ b``, in float32, or in float64 if any argument is; w gets no gradient."""
    dtype = linalg.working_dtype(w, a, b)
    update = jnp.matmul(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    scale = jnp.asarray(scale, dtype)
    return jax.lax.stop_gradient(w).astype(dtype) + scale.reshape(*scale.shape, *(1,) * (w.ndim - scale.ndim)) * update


@dataclass(frozen=True)
class LoRA:
    """Low-rank update ``W + s a b`` with ``s = alpha / rank``.

    ``a [..., in, rank]`` and ``b [..., rank, out]`` are trained, the weight is not; leading axes are stacked weights.
    Of a table (a weight called ``embedding``) the side of the words begins at zero, of others ``b``.

    Source: arXiv 2106.09685; rsLoRA, arXiv 2312.03732; PiSSA, arXiv 2404.02948.

    Attributes:
      rank: Rank of the update.  A tuple gives one for each layer of a stacked weight, zero for none: arrays then have
        the largest, filled up with zeros that get no gradient.
      alpha: Numerator of the scale; a tuple for one for each layer.
      rslora: Whether ``s = alpha / sqrt(rank)``.
      init: "kaiming" (``a`` uniform within ``1 / sqrt(in)``), "gaussian" (deviation ``1 / rank``), or "pissa": the
        leading singular triplets, which :func:`subspace_jax.adapters.prepare` then takes from the weight;
        "pissa_randomized" finds them by a random sketch, for large weights.

    Raises:
      ValueError: A rank is below 1, alpha is not positive, or ``init`` is unknown.
    """

    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    rslora: bool = False
    init: str = "kaiming"

    def __post_init__(self):
        check_rank_alpha(self.rank, self.alpha)
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
        return start_factors(key, w, table, self)

    def bind(self, base: jax.Array, arrays: dict[str, jax.Array]) -> LoRAWeight:
        """Puts the weight and its arrays together."""
        return LoRAWeight(base, arrays["a"], arrays["b"], **scale_fields(self.scale, base), **probes_in(arrays))

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Logical axes of the frozen part and of the trained arrays, from those of the weight."""
        return names, factor_axes(names)

    def undo(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: None) -> jax.Array:
        """Takes the update out of a merged weight."""
        del kept
        return remove(merged, arrays["a"], arrays["b"], self.scale)


def remove(w: jax.Array, a: jax.Array, b: jax.Array, scale: float | tuple[float, ...]) -> jax.Array:
    """Forms ``w - scale * a @ b`` in the dtype of w."""
    return adapted(w, a, b, -jnp.asarray(scale, linalg.working_dtype(w, a, b))).astype(w.dtype)


def factor_axes(names: P) -> dict[str, P]:
    """Logical axes of ``a`` and ``b`` for a weight with these: the rank is never split."""
    *lead, rows, columns = names
    return {"a": P(*lead, rows, None), "b": P(*lead, None, columns)}


def scale_fields(scale: float | tuple[float, ...], base: jax.Array | P) -> dict:
    """Fields of a structured weight for a scale: an array where layers differ, and its axes for a base of axes."""
    if isinstance(scale, tuple):
        scales = P(*base[:-2]) if isinstance(base, P) else jnp.asarray(scale, linalg.working_dtype(base))
        return {"scales": scales, "scale": 0.0}
    return {"scale": scale}


def scale_of(rank, alpha, rslora: bool) -> float | tuple[float, ...]:
    """The scale for a rank and an alpha, either of which may be a tuple over layers."""
    if not isinstance(rank, tuple) and not isinstance(alpha, tuple):
        return alpha / (math.sqrt(rank) if rslora else rank)
    layers = len(rank if isinstance(rank, tuple) else alpha)
    ranks = rank if isinstance(rank, tuple) else (rank,) * layers
    alphas = alpha if isinstance(alpha, tuple) else (alpha,) * layers
    scales = tuple(0.0 if r == 0 else a / (math.sqrt(r) if rslora else r) for r, a in zip(ranks, alphas, strict=True))
    return scales[0] if len(set(scales)) == 1 else scales


def check_rank_alpha(rank, alpha) -> None:
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


def start_factors(key: jax.Array, w: jax.Array, table: bool, setting) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Draws ``a`` and ``b``; the frozen part is w, less their product for PiSSA."""
    *lead, rows, columns = w.shape
    ranks, width = setting.rank, max(setting.rank) if isinstance(setting.rank, tuple) else setting.rank
    for name, given in (("rank", setting.rank), ("alpha", setting.alpha)):
        if isinstance(given, tuple) and (len(lead) != 1 or len(given) != lead[0]):
            raise ValueError(f"{name}: {len(given)} for the layers of a weight {w.shape}")
    if width > min(rows, columns):
        warnings.warn(f"rank {width} exceeds the {min(rows, columns)} of a weight {w.shape}", stacklevel=4)
    dtype = linalg.working_dtype(w)
    if not setting.init.startswith("pissa"):
        used = jnp.arange(width)[None] < jnp.reshape(jnp.asarray(ranks), (-1, 1))
        used = used.astype(dtype).reshape(*(lead if isinstance(ranks, tuple) else [1] * len(lead)), 1, width)
        if table:
            b = jax.random.normal(key, (*lead, width, columns), dtype)
            return w, {"a": jnp.zeros((*lead, rows, width), dtype), "b": b * jnp.swapaxes(used, -1, -2)}
        if setting.init == "kaiming":
            bound = 1 / math.sqrt(rows)
            a = jax.random.uniform(key, (*lead, rows, width), dtype, -bound, bound)
        else:
            a = jax.random.normal(key, (*lead, rows, width), dtype) / jnp.maximum(jnp.sum(used, -1, keepdims=True), 1)
        return w, {"a": a * used, "b": jnp.zeros((*lead, width, columns), dtype)}
    if width > min(rows, columns):
        raise ValueError(f"rank: PiSSA has at most {min(rows, columns)} triplets of a weight {w.shape}, got {width}")
    scale = setting.scale
    if isinstance(scale, tuple):
        raise ValueError(f"alpha: PiSSA takes one for all layers, got {setting.alpha}")
    full = w.astype(dtype)
    if setting.init == "pissa":
        u, s, vt = linalg.canonical_svd(full)
        u, s, vt = u[..., :width], s[..., :width], vt[..., :width, :]
    else:
        u, s, vt = linalg.randomized_svd(key, full, width, oversample=16, power_steps=4)
    root = jnp.sqrt(s / scale)
    a, b = u * root[..., None, :], root[..., :, None] * vt
    return remove(w, a, b, scale), {"a": a, "b": b}
