"""SVFit: a frozen weight whose leading singular values are trained."""

import math
import warnings
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, nn

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
class SpectralBase:
    """A weight with its leading singular triplets: what :func:`prepare` puts in a weight's place.

    Attributes:
      weight: ``[..., in, out]``.
      bases: Its triplets.
    """

    weight: jax.Array
    bases: SpectralBases

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.weight.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SVFitWeight:
    """A weight ``base + u diag(shift) vt`` that is never formed.

    Attributes:
      base: Frozen weight and triplets.
      delta: Trained ``[..., r]``.
      param: How ``delta`` moves the singular values.
    """

    base: SpectralBase
    delta: jax.Array
    param: str = field(default="linear", metadata={"static": True})

    @property
    def shift(self) -> jax.Array:
        """By how much each singular value differs from that of the frozen weight, ``[..., r]``."""
        sigma = jax.lax.stop_gradient(self.base.bases.sigma)
        if self.param == "linear":
            return self.delta
        if self.param == "relu":
            return jax.nn.relu(sigma + self.delta) - sigma
        return sigma * jnp.expm1(self.delta)

    @property
    def sigma(self) -> jax.Array:
        """The singular values as they are now, ``[..., r]``; they may have changed order or sign."""
        return self.base.bases.sigma + self.shift

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        base = jax.lax.stop_gradient(self.base)
        return nn.linear(x, base.weight) + through(x, base.bases.u, self.shift, base.bases.vt)

    def lookup(self, tokens: jax.Array, dtype) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        base = jax.lax.stop_gradient(self.base)
        rows = nn.embed(tokens, base.bases.u, dtype)
        rows = rows * jnp.broadcast_to(self.shift.astype(dtype), rows.shape)
        return nn.embed(tokens, base.weight, dtype) + jnp.matmul(rows, base.bases.vt.astype(dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        base = jax.lax.stop_gradient(self.base)
        v, ut = (jnp.swapaxes(y, -1, -2) for y in (base.bases.vt, base.bases.u))
        return nn.unembed(x, base.weight) + through(x, v, self.shift, ut)

    def dense(self) -> jax.Array:
        """Returns the weight itself, in its dtype."""
        base = jax.lax.stop_gradient(self.base)
        return shifted(base.weight, base.bases, self.shift)


def through(x: jax.Array, first: jax.Array, shift: jax.Array, second: jax.Array) -> jax.Array:
    """Returns ``((x @ first) * shift) @ second`` in the dtype of x."""
    # The r numbers between stay in float32: a shift of 0.01 would be lost beside a singular value of 50 in bfloat16.
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
class SVFit:
    """Trains the leading singular values of a weight: one number for each, nothing else.

    ``W' = W + u diag(delta) vt`` with ``delta`` zero at the start, so that the weight stays as it is and small changes
    are not rounded away.  Needs :func:`subspace_jax.adapters.prepare`, which takes an SVD of each weight; keep what it
    returns in a checkpoint, for the vectors of equal singular values are not unique.  Use a learning rate about ten
    times LoRA's, and no weight decay.

    Source: arXiv 2409.05926; ``param`` "relu" is SVDiff's, arXiv 2303.11305.

    Attributes:
      rank: How many singular values; None for all.  More than there are is cut down with a warning.  "energy": the
        fewest whose squares make up ``tau`` of the sum of all squares; "sum": likewise without squares.  Of stacked
        weights the one that needs most decides.
      param: "linear" (``sigma + delta``), "relu" (``max(sigma + delta, 0)``) or "log" (``sigma exp(delta)``).
      tau: Share, in (0, 1].

    Raises:
      ValueError: The rank is below 1, or a name or the share is out of range.
    """

    rank: int | str | None = None
    param: str = "linear"
    tau: float = 0.99
    keeps_base = False

    def __post_init__(self):
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not (self.rank is None or self.rank in ("energy", "sum") or whole):
            raise ValueError(f"rank: expected None, 'energy', 'sum' or an integer of at least 1, got {self.rank!r}")
        if self.param not in PARAMS:
            raise ValueError(f"param: expected one of {PARAMS}, got {self.param!r}")
        _check_tau(self.tau)

    def start(self, key: jax.Array, w: jax.Array, table: bool) -> tuple[SpectralBase, dict[str, jax.Array]]:
        """Factors a weight ``[..., in, out]``; the singular values' changes begin at zero."""
        del key, table
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

    def bind(self, base: SpectralBase, arrays: dict[str, jax.Array]) -> SVFitWeight:
        """Puts the weight and its arrays together."""
        if not isinstance(base, SpectralBase):
            raise ValueError("params: SVFit needs the tree that prepare returned, with its singular vectors")
        return SVFitWeight(base, arrays["delta"], self.param)

    def axes(self, names: P) -> tuple[SpectralBase, dict[str, P]]:
        """Logical axes of the frozen part and of the trained array, from those of the weight."""
        *lead, rows, columns = names
        bases = SpectralBases(P(*lead, rows, None), P(*lead, None, columns), P(*lead, None))
        return SpectralBase(names, bases), {"delta": P(*lead, None)}

    def unmerge(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: SpectralBases) -> SpectralBase:
        """Takes the update out of a merged weight."""
        weight = SVFitWeight(SpectralBase(merged, kept), arrays["delta"], self.param)
        return SpectralBase(shifted(merged, kept, -weight.shift), kept)


def energy_rank(sigma: jax.Array, tau: float, *, kind: str = "energy") -> np.ndarray:
    """Fewest leading singular values that make up a share of all; looks at values, hence not under ``jax.jit``.

    Args:
      sigma: ``[..., p]``, descending, not negative.
      tau: Share, in (0, 1].
      kind: "energy" counts squares, "sum" the values themselves.

    Returns:
      ``[...]`` integers from 1 to p.

    Raises:
      ValueError: The share or the kind is out of range.
    """
    _check_tau(tau)
    if kind not in ("energy", "sum"):
        raise ValueError(f"kind: expected 'energy' or 'sum', got {kind!r}")
    values = np.asarray(sigma, np.float64)
    values = np.cumsum(values**2 if kind == "energy" else values, axis=-1)
    total = values[..., -1:]
    # All of a share of 1 is reached where the rest is zero, not where rounding says so.
    return np.minimum(np.sum(values < tau * total, axis=-1) + 1, values.shape[-1])


def _check_tau(tau: float) -> None:
    if not (isinstance(tau, float | int) and math.isfinite(tau) and 0 < tau <= 1):
        raise ValueError(f"tau: expected a share in (0, 1], got {tau!r}")
