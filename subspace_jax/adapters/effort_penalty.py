"""The two penalties of Effort, for stacks of weights; no array of the size of a weight is formed."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.adapters.api import PyTree, Rules, bases_of, settings_of
from subspace_jax.adapters.effort import Effort, EffortBase, PrincipalBases
from subspace_jax.adapters.rules import adapters_of


def orthogonality_loss(u: jax.Array, vt: jax.Array, bases: PrincipalBases, *, squared: bool = False) -> jax.Array:
    """Distance of the principal and residual singular vectors together from orthonormality.

    ``||[V, v]^T [V, v] - I||_F / 2 + ||[U, u] [U, u]^T - I||_F / 2`` as in the authors' code, where V and v are the
    vectors of the inputs and U and u those of the outputs.  With more outputs than inputs the second norm is at least
    ``sqrt(out - in)``, as the projector is not the identity.

    A norm has no gradient at zero, where training starts; values up to rounding get none.  With ``squared`` the loss
    is half the squares, and has a gradient everywhere.

    Source: arXiv 2411.15633, version 1.

    Args:
      u: Residual left singular vectors ``[..., in, q]``.
      vt: Residual right singular vectors ``[..., q, out]``.
      bases: The principal singular vectors.
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
    """Change of the squared Frobenius norm of the weight, ``| ||W_now||^2 - ||W||^2 |``.

    No array of the size of the weight is formed, and its norm, beside which a change would be lost, does not enter.  A
    change up to rounding has no gradient, as the absolute value has none at the start.

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
    # The cross term is rounding, in proportion to the principal part.
    size = jnp.sum(jnp.square(w.astype(u.dtype)), axis=(-2, -1))
    least = 16 * float(jnp.finfo(u.dtype).eps) * jax.lax.stop_gradient(jnp.sqrt(size * energy) + energy)
    distance = jnp.abs(change)
    return jnp.where(distance > least, distance, jax.lax.stop_gradient(distance))


def effort_penalty(params: PyTree, trainable: PyTree, settings: Rules, *, squared: bool = False) -> jax.Array:
    """Mean over all Effort weights of :func:`orthogonality_loss` plus :func:`energy_loss`.

    Add it to the loss times a coefficient (the authors used 1).  Works under ``jax.jit`` and ``jax.grad``.

    Args:
      params: The frozen tree of :func:`prepare`.
      trainable: The adapters.
      settings: The same rules, Effort with ``bases``.
      squared: See :func:`orthogonality_loss`.

    Returns:
      A scalar.

    Raises:
      ValueError: No adapter is Effort, or one has no bases.
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
        raise ValueError("settings: no adapter is Effort")
    return sum(jnp.sum(x) for x in losses) / sum(x.size for x in losses)


def _defect(principal: jax.Array, residual: jax.Array) -> jax.Array:
    """Returns ``||G - I||_F^2`` for the Gram matrix G of orthonormal principal and residual vectors."""
    own = linalg.gram(residual, residual)
    own = own - jnp.broadcast_to(jnp.eye(own.shape[-1], dtype=own.dtype), own.shape)
    across = linalg.gram(principal, residual)
    return 2 * jnp.sum(jnp.square(across), axis=(-2, -1)) + jnp.sum(jnp.square(own), axis=(-2, -1))


def _root(square: jax.Array, least: float) -> jax.Array:
    large = square > least**2
    return jnp.where(large, jnp.sqrt(jnp.where(large, square, 1)), jax.lax.stop_gradient(jnp.sqrt(square)))
