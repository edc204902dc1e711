"""Effort: a frozen principal part of a weight, and trained residual triplets."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.svfit import SpectralBases, shifted, through


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EffortWeight:
    """A weight ``base + u diag(s) vt`` that is never formed.

    Attributes:
      base: The frozen principal part, ``[..., in, out]``.
      u: Trained ``[..., in, q]``.
      s: Trained ``[..., q]``.
      vt: Trained ``[..., q, out]``.
    """

    base: jax.Array
    u: jax.Array
    s: jax.Array
    vt: jax.Array

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        return nn.linear(x, jax.lax.stop_gradient(self.base)) + through(x, self.u, self.s, self.vt)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        rows = nn.embed(tokens, self.u, dtype)
        rows = rows * jnp.broadcast_to(self.s.astype(dtype), rows.shape)
        return nn.embed(tokens, jax.lax.stop_gradient(self.base), dtype) + jnp.matmul(rows, self.vt.astype(dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        v, ut = (jnp.swapaxes(y, -1, -2) for y in (self.vt, self.u))
        return nn.unembed(x, jax.lax.stop_gradient(self.base)) + through(x, v, self.s, ut)

    def dense(self) -> jax.Array:
        """Returns the weight itself, in its dtype."""
        return shifted(jax.lax.stop_gradient(self.base), SpectralBases(self.u, self.vt, self.s), self.s)


@dataclass(frozen=True)
class Effort:
    """Trains the minor singular triplets of a weight, and keeps the principal part.

    All three parts of a triplet are trained, without constraint, as in the released code: the residual part is
    orthogonal to the principal one at the start only.  Needs :func:`subspace_jax.adapters.prepare`, which takes an SVD
    of each weight and whose frozen tree holds the principal part; the start equals the weight up to rounding.

    Source: arXiv 2411.15633.

    Attributes:
      residual: How many triplets are trained, counted from the smallest.

    Raises:
      ValueError: ``residual`` is below 1.
    """

    residual: int = 1
    keeps_base = False

    def __post_init__(self):
        if not isinstance(self.residual, int) or isinstance(self.residual, bool) or self.residual < 1:
            raise ValueError(f"residual: expected an integer of at least 1, got {self.residual!r}")

    @property
    def rank(self) -> int:
        """Number of trained triplets."""
        return self.residual

    def start(self, key: jax.Array, w: jax.Array, table: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Splits a weight ``[..., in, out]``."""
        del key, table
        if w.ndim < 2 or self.residual > min(w.shape[-2:]):
            raise ValueError(f"residual: {self.residual} triplets of a weight {w.shape}")
        if not isinstance(w, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(w))):
            raise ValueError(f"Effort: a weight {w.shape} is not finite, and has no singular values")
        u, s, vt = linalg.canonical_svd(w.astype(linalg.working_dtype(w)))
        u, s, vt = u[..., -self.residual :], s[..., -self.residual :], vt[..., -self.residual :, :]
        return shifted(w, SpectralBases(u, vt, s), -s), {"u": u, "s": s, "vt": vt}

    def bind(self, base: jax.Array, arrays: dict[str, jax.Array]) -> EffortWeight:
        """Puts the weight and its arrays together."""
        return EffortWeight(base, arrays["u"], arrays["s"], arrays["vt"])

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Logical axes of the frozen part and of the trained arrays, from those of the weight."""
        *lead, rows, columns = names
        return names, {"u": P(*lead, rows, None), "s": P(*lead, None), "vt": P(*lead, None, columns)}

    def undo(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: None) -> jax.Array:
        """Takes the residual part out of a merged weight."""
        del kept
        return shifted(merged, SpectralBases(arrays["u"], arrays["vt"], arrays["s"]), -arrays["s"])
