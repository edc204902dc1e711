"""Leading subspaces by their share of energy, and the overlap of subspaces."""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix, check_same_space
from subspace_jax.linalg.products import broadcast_leading, gram, working_dtype
from subspace_jax.linalg.svd import canonical_svd, randomized_svd


class EnergyBasis(NamedTuple):
    """Left singular vectors ``q [..., d, r]`` and which of them span the subspace, ``kept [..., r]``.

    The kept columns come first: ``q[:, : kept.sum()]`` is the basis.  ``q`` has the others too, for static shapes.
    """

    q: jax.Array
    kept: jax.Array


class MSOResult(NamedTuple):
    """Mode-subspace overlap of two matrices, arrays ``[...]``.

    ``mso`` is in [0, 1], NaN where a matrix is zero or not finite; ``k_a`` and ``k_b`` are the dimensions of the
    subspaces, int32; ``random_baseline`` is the expected overlap of independent uniform subspaces of these dimensions.
    """

    mso: jax.Array
    k_a: jax.Array
    k_b: jax.Array
    random_baseline: jax.Array


def energy_basis(m: jax.Array, eta: float | jax.Array, max_rank: int | None = None) -> EnergyBasis:
    """The fewest leading left singular vectors that hold a share of the squared Frobenius norm (arXiv 2505.14185).

    The dimension is the first ``k`` with ``s_1^2 + ... + s_k^2 >= eta * (s_1^2 + ... + s_r^2)``, up to four units of
    rounding, so that equal singular values at an exact threshold count as exact.

    Args:
      m: ``[..., d, n]``, floating point; its column space is meant.
      eta: Share of the energy, in (0, 1]; of a traced one this is not checked.
      max_rank: Number of singular vectors to compute by a randomized SVD with two power steps, whose sketch is always
        the same; ``eta`` then is a share of the energy that these hold.  All of them, exactly, by default or at
        ``min(d, n)`` and above.

    Returns:
      The basis, float32 or wider, with ``r = min(d, n)`` or ``max_rank``.  A zero matrix keeps none, one that is not
      finite has NaN for ``q`` and keeps none.

    Raises:
      ValueError: ``m`` is no matrix, ``eta`` is not in (0, 1], or ``max_rank`` is below 1.
      TypeError: ``m`` is not floating point.
    """
    if not jnp.issubdtype(m.dtype, jnp.floating):
        raise TypeError(f"m: expected floating point, got {m.dtype}")
    m = m.astype(working_dtype(m))
    check_matrix("m", m)
    if not isinstance(eta, jax.core.Tracer) and not 0 < eta <= 1:
        raise ValueError(f"eta: expected a share in (0, 1], got {eta}")
    rank = min(m.shape[-2:]) if max_rank is None else operator.index(max_rank)
    if rank < 1:
        raise ValueError(f"max_rank: expected at least 1, got {rank}")
    if rank < min(m.shape[-2:]):
        q, s, _ = randomized_svd(jax.random.key(0), m, rank)
    else:
        q, s, _ = canonical_svd(m)
    # Relative to the largest, so that squares neither overflow nor vanish.
    energy = jnp.cumsum(jnp.square(s / jnp.where(s[..., :1] > 0, s[..., :1], 1)), axis=-1)
    enough = energy >= jnp.asarray(eta, s.dtype) * energy[..., -1:] * (1 - 4 * jnp.finfo(s.dtype).eps)
    before = jnp.concatenate([jnp.zeros_like(enough[..., :1]), enough[..., :-1]], axis=-1)
    return EnergyBasis(q, ~before & (s[..., :1] > 0))


def subspace_overlap(a: jax.Array, b: jax.Array) -> jax.Array:
    """Overlap of two subspaces, ``||a^T b||_F^2 / min(p, q)``: the mean squared cosine of their principal angles.

    Independent uniform subspaces overlap by ``max(p, q) / n`` on average.

    Args:
      a: Orthonormal basis ``[..., n, p]``.
      b: Orthonormal basis ``[..., n, q]``.

    Returns:
      ``[...]``, in [0, 1] up to rounding, at least float32.

    Raises:
      ValueError: The bases are not of the same space, or wider than tall.
      TypeError: They are not floating point.
    """
    check_same_space(a, b)
    dtype = working_dtype(a, b)
    a, b = broadcast_leading(a.astype(dtype), b.astype(dtype))
    return jnp.sum(jnp.square(gram(a, b)), axis=(-2, -1)) / min(a.shape[-1], b.shape[-1])


def mode_subspace_overlap(a: jax.Array, b: jax.Array, eta: float | jax.Array, max_rank: int | None = None) -> MSOResult:
    """Overlap of the leading subspaces of two matrices (mode-subspace overlap, arXiv 2505.14185).

    ``||q_a^T q_b||_F^2 / min(k_a, k_b)`` for the energy bases of both.  It is symmetric, and does not change when a
    matrix is scaled or multiplied from the right by an orthogonal one.

    Args:
      a: ``[..., d, n]``, floating point; its column space is meant.
      b: ``[..., d, m]``.
      eta: Share of the energy, in (0, 1]; of a traced one this is not checked.
      max_rank: See `energy_basis`.

    Returns:
      The result, whose ``random_baseline`` is ``max(k_a, k_b) / d``.

    Raises:
      ValueError: The matrices have columns of different length; other arguments: see `energy_basis`.
      TypeError: They are not floating point.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-2] != b.shape[-2]:
        raise ValueError(f"a, b: expected matrices [..., d, n] and [..., d, m] of one d, got {a.shape} and {b.shape}")
    (qa, kept_a), (qb, kept_b) = energy_basis(a, eta, max_rank), energy_basis(b, eta, max_rank)
    dtype = working_dtype(qa, qb)
    qa, qb = (jnp.where(kept[..., None, :], q, 0).astype(dtype) for q, kept in ((qa, kept_a), (qb, kept_b)))
    shared = jnp.sum(jnp.square(gram(*broadcast_leading(qa, qb))), axis=(-2, -1))
    k_a, k_b = jnp.broadcast_arrays(*(jnp.sum(kept, axis=-1, dtype=jnp.int32) for kept in (kept_a, kept_b)))
    fewer = jnp.minimum(k_a, k_b).astype(dtype)
    mso = jnp.where(fewer > 0, jnp.minimum(shared / jnp.maximum(fewer, 1), 1), jnp.nan)
    return MSOResult(mso, k_a, k_b, jnp.maximum(k_a, k_b).astype(dtype) / a.shape[-2])
