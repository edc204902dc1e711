"""Gradients projected out of given subspaces, and Gradient Projection Memory, which builds these (ICLR 2021)."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim.projected._bases import with_bases

PyTree = Any
BasisRule = Callable[[str, tuple[int, ...]], "jax.Array | GPMBasis | None"]


class GPMBasis(NamedTuple):
    """The subspace of a layer's inputs that must not be disturbed.

    Attributes:
      basis: ``[..., d, k]``, orthonormal columns, and zero columns behind them.
      dim: ``[...]`` of int32, how many columns are in use.
    """

    basis: jax.Array
    dim: jax.Array


def project_out(bases: PyTree | BasisRule) -> optax.GradientTransformationExtraArgs:
    """Projects gradients of kernels out of a subspace: ``G - M (M^T G)``.

    Put it before an optimizer without weight decay, and nothing after it that mixes rows: with steps of ``sgd``
    ``M^T (W_t - W_0) = 0``.  Adam's division undoes the orthogonality; put this transform after it then.

    Args:
      bases: Tree like the parameters.  Leaves are orthonormal columns ``M [..., d, k]``, zero columns allowed, for
        kernels ``[..., d, n]``; a :class:`GPMBasis`; or None for what is left as it is.  Or a rule
        ``bases(path, shape)`` that returns one of these for each leaf.

    Returns:
      The transform; its state is empty.

    Raises:
      ValueError: ``update`` raises it where a basis doesn't fit a kernel, or the trees differ.
      TypeError: ``update`` raises it for a complex kernel.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax import optim
      >>> old = jax.numpy.eye(8)[:, :3]
      >>> tx = optax.chain(optim.project_out({"kernel": old, "bias": None}), optax.sgd(0.1))
    """
    return with_bases(bases, _without)


def gradient_projection_memory(
    learning_rate: optax.ScalarOrSchedule, bases: PyTree | BasisRule
) -> optax.GradientTransformationExtraArgs:
    """SGD that preserves a network's outputs on earlier tasks (Saha, Garg, Roy, ICLR 2021).

    Bases are those of the inputs of each layer in earlier tasks; :func:`gpm_update` makes them.

    Args:
      learning_rate: Fixed learning rate or schedule.
      bases: See :func:`project_out`.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`project_out`.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> memory = optim.gpm_update(None, jax.random.normal(jax.random.key(0), (8, 30)), 0.95)
      >>> tx = optim.gradient_projection_memory(0.1, {"kernel": memory})
    """
    _checks.check_rate("learning_rate", learning_rate)
    return optax.chain(project_out(bases), optax.scale_by_learning_rate(learning_rate))


def gpm_update(memory: GPMBasis | None, activations: jax.Array, threshold: ArrayLike) -> GPMBasis:
    """Adds the main directions of a task's inputs to the memory of a layer, until they hold a share of the squares.

    The first task keeps directions whose cumulated share is below the threshold; later ones add directions of what
    the memory leaves out, one at a time, while the share that memory and additions hold is below it.

    Args:
      memory: What earlier tasks left, None for the first.
      activations: Inputs of the layer as columns, ``[..., d, samples]``, float32 or float64.
      threshold: Share in (0, 1].

    Returns:
      The memory, of ``d`` columns; the first ``dim`` are in use.

    Raises:
      ValueError: ``threshold`` is outside (0, 1], or the shapes don't fit.
      TypeError: ``activations`` is neither float32 nor float64.
    """
    if isinstance(threshold, numbers.Real) and not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share above 0 and up to 1, got {threshold}")
    d = activations.shape[-2] if activations.ndim > 1 else None
    if memory is not None and memory.basis.shape != (*activations.shape[:-1], d):
        raise ValueError(
            f"activations: expected [..., {memory.basis.shape[-2]}, samples] for a memory of shape "
            f"{memory.basis.shape}, got {activations.shape}"
        )
    rest = activations
    if memory is not None:
        rest = activations - linalg.times(memory.basis, linalg.gram(memory.basis, activations))
    u, s, _ = linalg.canonical_svd(rest)
    total = jnp.maximum(jnp.sum(jnp.square(activations), axis=(-2, -1)), 1e-37)[..., None]
    held = 1 - jnp.sum(jnp.square(rest), axis=(-2, -1))[..., None] / total
    limit = jnp.asarray(threshold).astype(s.dtype)
    shares = jnp.cumsum(jnp.square(s), axis=-1) / total
    if memory is None:
        dim, old = jnp.zeros(s.shape[:-1], jnp.int32), jnp.zeros((*u.shape[:-1], d), u.dtype)
        taken = shares < limit
    else:
        dim, old = memory.dim, memory.basis
        # A direction is taken if what is held before it is below the threshold.
        taken = held + shares - jnp.square(s) / total < limit
    order = jax.lax.broadcasted_iota(jnp.int32, s.shape, s.ndim - 1)
    positions = jnp.where(taken, dim[..., None] + order, -1)
    basis = old + linalg.times(u, jax.nn.one_hot(positions, d, dtype=u.dtype))
    return GPMBasis(basis, jnp.minimum(dim + jnp.sum(taken, axis=-1, dtype=jnp.int32), d))


def _without(name, g, m):
    m = m.basis if isinstance(m, GPMBasis) else m
    if g.ndim < 2 or m.ndim < 2 or m.shape[-2] != g.shape[-2]:
        raise ValueError(f"bases: expected [..., d, k] for the kernel {name} of shape {g.shape}, got {m.shape}")
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: expected a real kernel, got {g.dtype}")
    dtype = linalg.working_dtype(g)
    m, x = m.astype(dtype), g.astype(dtype)
    out = automatic(lambda m, x: x - linalg.times(m, linalg.gram(m, x)), (m, x), lambda: spec_of(x))
    return out.astype(g.dtype)
