"""Effort: the principal part of a weight is frozen, its minor singular triplets train."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.config import AdapterConfig, Arrays
from subspace_jax.adapters.structured import StructuredWeight, axes_of
from subspace_jax.adapters.svfit import SpectralBases, scaled_matmuls, shifted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrincipalBases:
    """Singular vectors of the principal part, frozen.

    Attributes:
      u: ``[..., in, p - q]``.
      vt: ``[..., p - q, out]``.
      energy: ``[...]``, sum of the squared residual singular values at the start.
    """

    u: jax.Array
    vt: jax.Array
    energy: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EffortBase(StructuredWeight):
    """The principal part of a weight with its singular vectors: the frozen part of :class:`Effort` with bases.

    Attributes:
      weight: The principal part, ``[..., in, out]``.
      bases: Its singular vectors.
    """

    weight: jax.Array
    bases: PrincipalBases

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def dense(self) -> jax.Array:
        """Returns the principal part."""
        return self.weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EffortWeight(StructuredWeight):
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
        return nn.linear(x, self.base) + scaled_matmuls(x, self.u, self.s, self.vt)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        rows = nn.embed(tokens, self.u, dtype)
        rows = rows * jnp.broadcast_to(self.s.astype(dtype), rows.shape)
        return nn.embed(tokens, self.base, dtype) + jnp.matmul(rows, self.vt.astype(dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        v, ut = (jnp.swapaxes(y, -1, -2) for y in (self.vt, self.u))
        return nn.unembed(x, self.base) + scaled_matmuls(x, v, self.s, ut)

    def dense(self) -> jax.Array:
        """Returns the weight, in the dtype of ``base``."""
        return shifted(self.base, SpectralBases(self.u, self.vt, self.s), self.s)


@dataclass(frozen=True)
class Effort(AdapterConfig):
    """Trains the minor singular triplets of a weight; the principal part is frozen.

    All three parts of a triplet train, without constraint, as in the released code: the residual part is orthogonal to
    the principal part at the start only, unless it is projected or penalized
    (:func:`subspace_jax.adapters.effort_penalty`).  Needs :func:`subspace_jax.adapters.prepare`, which computes an SVD
    of each weight and whose frozen tree holds the principal part; the start equals the weight up to rounding.

    Source: arXiv 2411.15633.

    Attributes:
      residual: Number of triplets that train, counted from the smallest.
      project: Whether :func:`subspace_jax.adapters.bind` projects ``u`` and ``vt`` off the principal part, so that the
        weight acts on the principal directions exactly as before, whatever the optimizer does; the projected part gets
        no gradient.
      bases: Whether the frozen tree holds the principal singular vectors, which ``project`` and the penalty need:
        ``in + out`` parameters for each of them.

    Raises:
      ValueError: ``residual`` is below 1.
    """

    residual: int = 1
    project: bool = False
    bases: bool = False

    labels: ClassVar = {"u": "factor", "s": "spectrum", "vt": "factor"}
    quantizable_base = False
    keeps_base = False
    changes_base = True

    def __post_init__(self):
        if not isinstance(self.residual, int) or isinstance(self.residual, bool) or self.residual < 1:
            raise ValueError(f"residual: expected an integer of at least 1, got {self.residual!r}")

    @property
    def rank(self) -> int:
        """Number of triplets that train."""
        return self.residual

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[jax.Array | EffortBase, Arrays]:
        """Separates principal and residual part of a weight ``[..., in, out]``; see :class:`AdapterConfig`."""
        del key, table, gradient
        q = self.residual
        if w.ndim < 2 or q > min(w.shape[-2:]):
            raise ValueError(f"residual: {q} triplets of a weight {w.shape}")
        if not isinstance(w, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(w))):
            raise ValueError(f"Effort: a weight {w.shape} is not finite, and has no singular values")
        u, s, vt = linalg.canonical_svd(w.astype(linalg.working_dtype(w)))
        arrays = {"u": u[..., -q:], "s": s[..., -q:], "vt": vt[..., -q:, :]}
        base = _without(w, arrays)
        if self._has_bases:
            energy = jnp.sum(jnp.square(arrays["s"]), axis=-1)
            base = EffortBase(base, PrincipalBases(u[..., :-q], vt[..., :-q, :], energy))
        return base, arrays

    def bind(self, base: jax.Array | EffortBase, arrays: Arrays, key: jax.Array | None = None) -> EffortWeight:
        """Returns the adapted weight."""
        del key
        weight = base.weight if isinstance(base, EffortBase) else base
        if self.project and axes_of(weight) is None:
            arrays = self._projected(base, arrays)
        return EffortWeight(weight, arrays["u"], arrays["s"], arrays["vt"])

    def axes(self, names: P) -> tuple[P | EffortBase, dict[str, P]]:
        """Returns the logical axes of the frozen part and of the triplets."""
        *lead, rows, columns = names
        own = {"u": P(*lead, rows, None), "s": P(*lead, None), "vt": P(*lead, None, columns)}
        if self._has_bases:
            return EffortBase(names, PrincipalBases(own["u"], own["vt"], P(*lead))), own
        return names, own

    def merge_state(self, base: jax.Array | EffortBase, arrays: Arrays) -> PrincipalBases | None:
        """Returns the principal singular vectors, where the frozen part holds them."""
        del arrays
        return base.bases if isinstance(base, EffortBase) else None

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: PrincipalBases | None) -> jax.Array | EffortBase:
        """Subtracts the residual part from a merged weight."""
        base = merged if kept is None else EffortBase(merged, kept)
        weight = _without(merged, self._projected(base, arrays) if self.project else arrays)
        return weight if kept is None else EffortBase(weight, kept)

    def start_state(self, base: jax.Array | EffortBase, arrays: Arrays) -> Arrays:
        """Returns the triplets of the start, and the principal singular vectors where the frozen part holds them."""
        if not self._has_bases:
            return dict(arrays)
        own = base.bases
        return {**arrays, "principal_u": own.u, "principal_vt": own.vt, "energy": own.energy}

    def restore_base(self, w: jax.Array, start: Arrays) -> jax.Array:
        """Subtracts the residual part of the start."""
        return _without(w, start)

    def attach_start(self, w: jax.Array, start: Arrays) -> jax.Array | EffortBase:
        """Returns the principal part, with its singular vectors where ``project`` or ``bases``."""
        if not self._has_bases:
            return w
        return EffortBase(w, PrincipalBases(start["principal_u"], start["principal_vt"], start["energy"]))

    @property
    def _has_bases(self) -> bool:
        return self.project or self.bases

    def _projected(self, base, arrays):
        if not isinstance(base, EffortBase):
            raise ValueError("params: a projected Effort needs the tree that prepare returned, with singular vectors")
        u, vt = base.bases.u, base.bases.vt
        # In 16 bits rounding would undo the projection.
        dtype = linalg.working_dtype(u, arrays["u"])
        u, vt, own_u, own_vt = (x.astype(dtype) for x in (u, vt, arrays["u"], arrays["vt"]))
        inside = linalg.times(u, linalg.gram(u, own_u)), linalg.times(linalg.times(own_vt, vt.mT), vt)
        return {"u": own_u - inside[0], "s": arrays["s"], "vt": own_vt - inside[1]}


def _without(w: jax.Array, arrays: Arrays) -> jax.Array:
    """Subtracts triplets from a weight."""
    return shifted(w, SpectralBases(arrays["u"], arrays["vt"], arrays["s"]), -arrays["s"])
