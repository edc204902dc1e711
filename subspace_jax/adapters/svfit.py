"""SVFit: a frozen weight whose leading singular values train."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.config import AdapterConfig, Arrays, LowRankUpdate
from subspace_jax.adapters.structured import StructuredWeight

PARAMS = ("linear", "relu", "log")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectralBases:
    """Leading singular triplets of a weight, all frozen.

    Attributes:
      u: ``[..., in, r]``.
      vt: ``[..., r, out]``.
      sigma: ``[..., r]``, descending.
    """

    u: jax.Array
    vt: jax.Array
    sigma: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectralBase(StructuredWeight):
    """A weight with its leading singular triplets: the frozen part of :class:`SVFit`.

    Attributes:
      weight: ``[..., in, out]``.
      bases: Its triplets.
    """

    weight: jax.Array
    bases: SpectralBases

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def dense(self) -> jax.Array:
        """Returns the weight."""
        return self.weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SVFitWeight(StructuredWeight):
    """A weight ``base + u diag(shift) vt`` that is never formed.

    Attributes:
      base: Frozen weight and triplets.
      delta: Trained ``[..., r]``.
      param: How ``delta`` changes the singular values, see :class:`SVFit`.
    """

    base: SpectralBase
    delta: jax.Array
    param: str = field(default="linear", metadata={"static": True})

    @property
    def shift(self) -> jax.Array:
        """Change of each singular value, ``[..., r]``."""
        sigma = self.base.bases.sigma
        if self.param == "linear":
            return self.delta
        if self.param == "relu":
            return jax.nn.relu(sigma + self.delta) - sigma
        return sigma * jnp.expm1(self.delta)

    @property
    def sigma(self) -> jax.Array:
        """The current singular values, ``[..., r]``; unsorted, and of any sign."""
        return self.base.bases.sigma + self.shift

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        base = self.base
        return nn.linear(x, base.weight) + scaled_matmuls(x, base.bases.u, self.shift, base.bases.vt)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        base = self.base
        rows = nn.embed(tokens, base.bases.u, dtype)
        rows = rows * jnp.broadcast_to(self.shift.astype(dtype), rows.shape)
        return nn.embed(tokens, base.weight, dtype) + jnp.matmul(rows, base.bases.vt.astype(dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        base = self.base
        v, ut = (jnp.swapaxes(y, -1, -2) for y in (base.bases.vt, base.bases.u))
        return nn.unembed(x, base.weight) + scaled_matmuls(x, v, self.shift, ut)

    def dense(self) -> jax.Array:
        """Returns the weight, in the dtype of ``base``."""
        base = self.base
        return shifted(base.weight, base.bases, self.shift)


def scaled_matmuls(x: jax.Array, first: jax.Array, shift: jax.Array, second: jax.Array) -> jax.Array:
    """Returns ``((x @ first) * shift) @ second`` in the dtype of x."""
    # The intermediate stays in float32: a shift of 0.01 would be lost beside a singular value of 50 in bfloat16.
    inner = jnp.matmul(x, first.astype(x.dtype), preferred_element_type=shift.dtype)
    inner = inner * jnp.broadcast_to(shift, inner.shape)
    return jnp.matmul(inner, second.astype(inner.dtype)).astype(x.dtype)


def shifted(w: jax.Array, bases: SpectralBases, shift: jax.Array) -> jax.Array:
    """Returns ``w + u diag(shift) vt`` in the dtype of w."""
    dtype = linalg.working_dtype(w, bases.u)
    moved = bases.u.astype(dtype) * shift.astype(dtype)[..., None, :]
    update = jnp.matmul(moved, bases.vt.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return (w.astype(dtype) + update).astype(w.dtype)


@dataclass(frozen=True)
class SVFit(AdapterConfig):
    """Trains the leading singular values of a weight and nothing else.

    ``W' = W + u diag(delta) vt`` with ``delta`` zero at the start, so that the weight begins unchanged and small
    changes are not rounded away.  Needs :func:`subspace_jax.adapters.prepare`, which computes an SVD of each weight;
    keep what it returns in a checkpoint, as the vectors of equal singular values are not unique.  Use a learning rate
    about ten times that of LoRA, and no weight decay.

    Source: arXiv 2409.05926; ``param`` "relu" is that of SVDiff, arXiv 2303.11305.

    Attributes:
      rank: Number of singular values; None for all.  A larger rank than the weight has is reduced with a warning.
        "energy": the fewest whose squares make up ``tau`` of the sum of squares; "sum": likewise without squares.
        The largest need among stacked weights counts.
      param: "linear" (``sigma + delta``), "relu" (``max(sigma + delta, 0)``) or "log" (``sigma exp(delta)``).
      tau: Fraction, in (0, 1].

    Raises:
      ValueError: The rank is below 1, or another field is out of range.
    """

    rank: int | str | None = None
    param: str = "linear"
    tau: float = 0.99

    labels: ClassVar = {"delta": "spectrum"}
    roles: ClassVar = {"delta": "no_decay"}
    quantizable_base = False
    keeps_base = False

    def __post_init__(self):
        positive = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not (self.rank is None or self.rank in ("energy", "sum") or positive):
            raise ValueError(f"rank: expected None, 'energy', 'sum' or an integer of at least 1, got {self.rank!r}")
        if self.param not in PARAMS:
            raise ValueError(f"param: expected one of {PARAMS}, got {self.param!r}")
        _check_tau(self.tau)

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[SpectralBase, Arrays]:
        """Computes the SVD of a weight ``[..., in, out]``; see :class:`AdapterConfig`."""
        del key, table, gradient
        if w.ndim < 2:
            raise ValueError(f"SVFit: expected weights [..., in, out], got {w.shape}")
        dtype, least = linalg.working_dtype(w), min(w.shape[-2:])
        if not isinstance(w, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(w))):
            raise ValueError(f"SVFit: a weight {w.shape} is not finite, and has no singular values")
        u, sigma, vt = linalg.canonical_svd(w.astype(dtype))
        rank = least if self.rank is None else self.rank
        if isinstance(rank, str):
            rank = int(np.max(energy_rank(sigma, self.tau, kind=rank)))
        if rank > least:
            warnings.warn(f"SVFit: rank {rank} exceeds the {least} of a weight {w.shape}", stacklevel=3)
        rank = min(rank, least)
        bases = SpectralBases(u[..., :rank], vt[..., :rank, :], sigma[..., :rank])
        return SpectralBase(w, bases), {"delta": jnp.zeros((*w.shape[:-2], rank), dtype)}

    def bind(self, base: SpectralBase, arrays: Arrays, key: jax.Array | None = None) -> SVFitWeight:
        """Returns the adapted weight."""
        del key
        if not isinstance(base, SpectralBase):
            raise ValueError("params: SVFit needs the tree that prepare returned, with its singular vectors")
        return SVFitWeight(base, arrays["delta"], self.param)

    def axes(self, names: P) -> tuple[SpectralBase, dict[str, P]]:
        """Returns the logical axes of the frozen part and of ``delta``."""
        *lead, rows, columns = names
        bases = SpectralBases(P(*lead, rows, None), P(*lead, None, columns), P(*lead, None))
        return SpectralBase(names, bases), {"delta": P(*lead, None)}

    def merge_state(self, base: SpectralBase, arrays: Arrays) -> SpectralBases:
        """Returns the singular triplets of the start."""
        del arrays
        return base.bases

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: SpectralBases) -> SpectralBase:
        """Subtracts the changes from a merged weight."""
        weight = SVFitWeight(SpectralBase(merged, kept), arrays["delta"], self.param)
        return SpectralBase(shifted(merged, kept, -weight.shift), kept)

    def start_state(self, base: SpectralBase, arrays: Arrays) -> Arrays:
        """Returns the singular triplets."""
        del arrays
        return {"u": base.bases.u, "vt": base.bases.vt, "sigma": base.bases.sigma}

    def attach_start(self, w: jax.Array, start: Arrays) -> SpectralBase:
        """Returns the weight with its singular triplets."""
        return SpectralBase(w, SpectralBases(**start))

    def low_rank_update(self, base: SpectralBase, arrays: Arrays) -> LowRankUpdate:
        """Returns the left vectors times the changes, and the right vectors."""
        weight = self.bind(base, arrays)
        u, shift = base.bases.u, weight.shift
        u = u.astype(linalg.working_dtype(u, shift))
        return LowRankUpdate(u * shift.astype(u.dtype)[..., None, :], base.bases.vt)

    def update_rank(self, arrays: Arrays) -> int:
        """Returns the number of singular values."""
        return arrays["delta"].shape[-1]

    @staticmethod
    def combine(
        configs: Sequence[AdapterConfig], arrays: Sequence[Arrays], weights: Sequence[ArrayLike]
    ) -> tuple[AdapterConfig, Arrays]:
        """Adds up the changes of linear configs, of one prepared tree."""
        if len(set(configs)) > 1 or configs[0].param != "linear":
            return AdapterConfig.combine(configs, arrays, weights)
        delta = sum(jnp.asarray(w, own["delta"].dtype) * own["delta"] for own, w in zip(arrays, weights, strict=True))
        return configs[0], {"delta": delta}


def energy_rank(sigma: jax.Array, tau: float, *, kind: str = "energy") -> np.ndarray:
    """Returns the fewest leading singular values that make up a fraction of all; not under ``jax.jit``.

    Args:
      sigma: ``[..., p]``, descending, not negative.
      tau: Fraction, in (0, 1].
      kind: "energy" counts squares, "sum" the values.

    Returns:
      ``[...]`` integers from 1 to p.

    Raises:
      ValueError: ``tau`` or ``kind`` is out of range.
    """
    _check_tau(tau)
    if kind not in ("energy", "sum"):
        raise ValueError(f"kind: expected 'energy' or 'sum', got {kind!r}")
    values = np.asarray(sigma, np.float64)
    values = np.cumsum(values**2 if kind == "energy" else values, axis=-1)
    total = values[..., -1:]
    # A fraction of 1 is reached where the rest is zero, not where the rounded sum says so.
    return np.minimum(np.sum(values < tau * total, axis=-1) + 1, values.shape[-1])


def _check_tau(tau: float) -> None:
    if not (isinstance(tau, float | int) and math.isfinite(tau) and 0 < tau <= 1):
        raise ValueError(f"tau: expected a fraction in (0, 1], got {tau!r}")
