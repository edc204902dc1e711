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
class PrincipalBases:
    """Singular vectors of the principal part, all frozen.

    Attributes:
      u: ``[..., in, p - q]``.
      vt: ``[..., p - q, out]``.
      energy: ``[...]``, the sum of the squares of the residual singular values at the start.
    """

    u: jax.Array
    vt: jax.Array
    energy: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EffortBase:
    """The principal part of a weight with its singular vectors: what :func:`prepare` puts in a weight's place.

    Attributes:
      weight: The principal part, ``[..., in, out]``.
      bases: Its singular vectors.
    """

    weight: jax.Array
    bases: PrincipalBases

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.weight.shape


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
    orthogonal to the principal one at the start only, unless it is projected or penalised
    (:func:`subspace_jax.adapters.effort_penalty`).  Needs :func:`subspace_jax.adapters.prepare`, which takes an SVD of
    each weight and whose frozen tree holds the principal part; the start equals the weight up to rounding.

    Source: arXiv 2411.15633.

    Attributes:
      residual: How many triplets are trained, counted from the smallest.
      project: Whether :func:`subspace_jax.adapters.bind` takes from ``u`` and ``vt`` what lies in the principal part,
        so that the weight acts on the principal directions exactly as it did, whatever the optimizer does; what it
        takes away gets no gradient.
      bases: Whether the frozen tree holds the principal singular vectors, which ``project`` and the penalty need:
        ``in + out`` numbers for each of them.

    Raises:
      ValueError: ``residual`` is below 1.
    """

    residual: int = 1
    project: bool = False
    bases: bool = False
    keeps_base = False

    def __post_init__(self):
        if not isinstance(self.residual, int) or isinstance(self.residual, bool) or self.residual < 1:
            raise ValueError(f"residual: expected an integer of at least 1, got {self.residual!r}")

    @property
    def rank(self) -> int:
        """Number of trained triplets."""
        return self.residual

    def start(self, key: jax.Array, w: jax.Array, table: bool) -> tuple[jax.Array | EffortBase, dict[str, jax.Array]]:
        """Splits a weight ``[..., in, out]``."""
        del key, table
        q = self.residual
        if w.ndim < 2 or q > min(w.shape[-2:]):
            raise ValueError(f"residual: {q} triplets of a weight {w.shape}")
        if not isinstance(w, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(w))):
            raise ValueError(f"Effort: a weight {w.shape} is not finite, and has no singular values")
        u, s, vt = linalg.canonical_svd(w.astype(linalg.working_dtype(w)))
        arrays = {"u": u[..., -q:], "s": s[..., -q:], "vt": vt[..., -q:, :]}
        base = shifted(w, SpectralBases(arrays["u"], arrays["vt"], arrays["s"]), -arrays["s"])
        if self.project or self.bases:
            energy = jnp.sum(jnp.square(arrays["s"]), axis=-1)
            base = EffortBase(base, PrincipalBases(u[..., :-q], vt[..., :-q, :], energy))
        return base, arrays

    def bind(self, base: jax.Array | EffortBase, arrays: dict[str, jax.Array]) -> EffortWeight:
        """Puts the weight and its arrays together."""
        weight = base.weight if isinstance(base, EffortBase) else base
        if self.project and not isinstance(weight, P):
            arrays = self._projected(base, arrays)
        return EffortWeight(weight, arrays["u"], arrays["s"], arrays["vt"])

    def axes(self, names: P) -> tuple[P | EffortBase, dict[str, P]]:
        """Logical axes of the frozen part and of the trained arrays, from those of the weight."""
        *lead, rows, columns = names
        own = {"u": P(*lead, rows, None), "s": P(*lead, None), "vt": P(*lead, None, columns)}
        if self.project or self.bases:
            return EffortBase(names, PrincipalBases(own["u"], own["vt"], P(*lead))), own
        return names, own

    def undo(
        self, merged: jax.Array, arrays: dict[str, jax.Array], kept: PrincipalBases | None
    ) -> jax.Array | EffortBase:
        """Takes the residual part out of a merged weight."""
        whole = merged if kept is None else EffortBase(merged, kept)
        arrays = self._projected(whole, arrays) if self.project else arrays
        weight = shifted(merged, SpectralBases(arrays["u"], arrays["vt"], arrays["s"]), -arrays["s"])
        return weight if kept is None else EffortBase(weight, kept)

    def _projected(self, base, arrays):
        if not isinstance(base, EffortBase):
            raise ValueError("params: a projected Effort needs the tree that prepare returned, with singular vectors")
        u, vt = (jax.lax.stop_gradient(x) for x in (base.bases.u, base.bases.vt))
        # In 16 bits what was taken away would come back by rounding.
        dtype = linalg.working_dtype(u, arrays["u"])
        u, vt, own_u, own_vt = (x.astype(dtype) for x in (u, vt, arrays["u"], arrays["vt"]))
        inside = linalg.times(u, linalg.gram(u, own_u)), linalg.times(linalg.times(own_vt, vt.mT), vt)
        return {"u": own_u - inside[0], "s": arrays["s"], "vt": own_vt - inside[1]}
