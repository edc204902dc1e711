"""Effort's two penalties, for any stack of weights, from products no larger than the residual part asks for."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.adapters.api import PyTree, Rules, bases_of, settings_of
from subspace_jax.adapters.effort import Effort, EffortBase, PrincipalBases
from subspace_jax.adapters.rules import adapters_of


def orthogonality_loss(u: jax.Array, vt: jax.Array, bases: PrincipalBases, *, squared: bool = False) -> jax.Array:
    """How far principal and residual singular vectors together are from orthonormal.

    ``||[V, v]^T [V, v] - I||_F / 2 + ||[U, u] [U, u]^T - I||_F / 2`` as the authors have it, where V and v are the
    vectors on the side of the inputs and U and u those of the outputs.  With more outputs than inputs the second norm
    is at least ``sqrt(out - in)``, for the projector is not the identity.

    A norm has no gradient where it is zero, which is where training starts.  What is no larger than rounding there
    gets none here; where ``squared``, the loss has half the squares, and a gradient everywhere.

    Source: arXiv 2411.15633, version 1.

    Args:
      u: ``[..., in, q]``, residual.
      vt: ``[..., q, out]``, residual.
      bases: The principal ones.
      squared: Whether norms are squared.

    Returns:
      ``[...]``.
    """
    inputs = _defect(bases.u, u)
    outputs = _defect(bases.vt.mT, vt.mT)
    rank = min(u.shape[-2], vt.shape[-1])
    floor = vt.shape[-1] - rank
    if squared:
        return 0.5 * (inputs + outputs + floor)
    # Rounding of the Gram matrix of p vectors, of which q are new.
    least = 16 * float(jnp.finfo(u.dtype).eps) * (rank * u.shape[-1]) ** 0.5
    return 0.5 * (_root(inputs, least) + _root(outputs + floor, least))


def energy_loss(w: jax.Array, u: jax.Array, s: jax.Array, vt: jax.Array, bases: PrincipalBases) -> jax.Array:
    """By how much the squared Frobenius norm of the weight has changed, ``| ||W_now||^2 - ||W||^2 |``.

    Nothing of the weight's size is formed, and its norm, beside which a change would be lost, does not enter.  A
    change no larger than rounding has no gradient, as at the start, where the absolute value has none.

    Args:
      w: The frozen principal part, ``[..., in, out]``.
      u: ``[..., in, q]``.
      s: ``[..., q]``.
      vt: ``[..., q, out]``.
      bases: The principal singular vectors, with the residual energy at the start.

    Returns:
      ``[...]``.
    """
    cross = jnp.sum(linalg.gram(u, w.astype(u.dtype)) * vt, axis=-1)
    own = linalg.gram(u, u) * linalg.times(vt, vt.mT)
    energy = jnp.einsum("...i,...ij,...j->...", s, own, s, precision=jax.lax.Precision.HIGHEST)
    change = energy - bases.energy + 2 * jnp.sum(s * cross, axis=-1)
    # The principal part meets the residual one in rounding only, of its own size.
    size = jnp.sum(jnp.square(w.astype(u.dtype)), axis=(-2, -1))
    least = 16 * float(jnp.finfo(u.dtype).eps) * jax.lax.stop_gradient(jnp.sqrt(size * energy) + energy)
    distance = jnp.abs(change)
    return jnp.where(distance > least, distance, jax.lax.stop_gradient(distance))


def effort_penalty(params: PyTree, trainable: PyTree, settings: Rules, *, squared: bool = False) -> jax.Array:
    """The mean over all Effort weights of :func:`orthogonality_loss` plus :func:`energy_loss`.

    Add it to the loss times a weight (the authors tried 1).  Works under ``jax.jit`` and ``jax.grad``.

    Args:
      params: The frozen tree of :func:`prepare`.
      trainable: The adapters.
      settings: The same rules, those of Effort with ``bases``.
      squared: See :func:`orthogonality_loss`.

    Returns:
      A scalar.

    Raises:
      ValueError: No weight is Effort's, or one has no bases.
    """
    found, at, losses = adapters_of(trainable), bases_of(params), []
    for path, setting in settings_of(trainable, settings).items():
        if not isinstance(setting, Effort):
            continue
        base, own = at.get(path), found[path]
        if not isinstance(base, EffortBase):
            raise ValueError(f"params: {path} has no singular vectors; set Effort(..., bases=True) and prepare again")
        losses.append(
            orthogonality_loss(own["u"], own["vt"], base.bases, squared=squared)
            + energy_loss(base.weight, own["u"], own["s"], own["vt"], base.bases)
        )
    if not losses:
        raise ValueError("settings: no weight is Effort's")
    return sum(jnp.sum(x) for x in losses) / sum(x.size for x in losses)


def _defect(principal: jax.Array, residual: jax.Array) -> jax.Array:
    """``||G - I||_F^2`` for the Gram matrix G of both, of which the principal ones are orthonormal."""
    own = linalg.gram(residual, residual)
    own = own - jnp.broadcast_to(jnp.eye(own.shape[-1], dtype=own.dtype), own.shape)
    across = linalg.gram(principal, residual)
    return 2 * jnp.sum(jnp.square(across), axis=(-2, -1)) + jnp.sum(jnp.square(own), axis=(-2, -1))


def _root(square: jax.Array, least: float) -> jax.Array:
    large = square > least**2
    return jnp.where(large, jnp.sqrt(jnp.where(large, square, 1)), jax.lax.stop_gradient(jnp.sqrt(square)))
