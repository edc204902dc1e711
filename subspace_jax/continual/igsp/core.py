"""Layers of routed low-rank experts, their penalty, and the subspace of historical experts.

A reconstruction of iGSP from its abstract (arXiv 2605.19301); the layer is that of MoE-Adapters4CL (arXiv 2403.11549)
with linear experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax import linalg, nn
from subspace_jax.continual.igsp.pool import ExpertPool

PyTree = Any


class Router(NamedTuple):
    """A linear router; leading axes are layers.

    Attributes:
      kernel: ``[..., d, experts]``, or None for probabilities that do not depend on the example.
      bias: ``[..., experts]``.
    """

    kernel: jax.Array | None
    bias: jax.Array


class OrthogonalComplementState(NamedTuple):
    """The bases of :func:`orthogonal_complement_updates`, a tree like the parameters."""

    basis: PyTree


def init_router(width: int, max_experts: int) -> Router:
    """Returns a router of zeros: all active experts have the same probability.

    Args:
      width: Features of the router's input; 0 for a router without input.
      max_experts: Slots of the pool.
    """
    return Router(jnp.zeros((width, max_experts)) if width else None, jnp.zeros(max_experts))


def route(router_in: jax.Array, router: Router, mask: jax.Array, top_k: int | None = None) -> jax.Array:
    """Returns the routing probabilities, the softmax of ``router_in @ kernel + bias`` over some experts.

    Args:
      router_in: ``[batch, d]``, floating point.
      router: The router, without leading axes.
      mask: ``[experts]`` bool, the experts that may be used; others have probability 0, and no gradient.
      top_k: Softmax over the largest logits only; over all of them by default.

    Returns:
      ``[batch, experts]``, float32 or wider.  With no expert, zeros.

    Raises:
      ValueError: The router has another width than ``mask`` or ``router_in``, or ``top_k`` is out of range.
    """
    experts = mask.shape[-1]
    if router.bias.shape != (experts,):
        raise ValueError(f"router: expected bias [{experts}], the experts of the pool, got {router.bias.shape}")
    if top_k is not None and not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts} experts, got {top_k}")
    dtype = linalg.working_dtype(router_in)
    logits = jnp.broadcast_to(router.bias.astype(dtype), (router_in.shape[0], experts))
    if router.kernel is not None:
        if router.kernel.shape != (router_in.shape[-1], experts):
            raise ValueError(
                f"router: expected kernel [{router_in.shape[-1]}, {experts}] for router_in {router_in.shape}, got "
                f"{router.kernel.shape}"
            )
        logits = logits + jnp.matmul(router_in.astype(dtype), router.kernel.astype(dtype))
    return masked_softmax(logits, jnp.broadcast_to(mask, logits.shape), top_k)


def masked_softmax(logits: jax.Array, mask: jax.Array, top_k: int | None = None) -> jax.Array:
    """Softmax of ``logits [..., experts]`` where ``mask`` holds, zero elsewhere, without NaN where none does."""
    logits = jnp.where(mask, logits, -jnp.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)
        mask = mask & jnp.any(jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool), axis=-2)
        logits = jnp.where(mask, logits, -jnp.inf)
    some = jnp.any(mask, axis=-1, keepdims=True)
    probs = jax.nn.softmax(jnp.where(some, logits, jnp.zeros_like(logits)), axis=-1)
    return jnp.where(mask, probs, jnp.zeros_like(probs))


def apply_experts(x: jax.Array, a: jax.Array, b: jax.Array, probs: jax.Array) -> jax.Array:
    """Returns ``sum_e p_e x a_e b_e`` by two matmuls, without a matrix of ``d_in x d_out``.

    Args:
      x: ``[batch, ..., d_in]``.
      a: ``[experts, d_in, rank]``.
      b: ``[experts, rank, d_out]``.
      probs: ``[batch, experts]``.

    Returns:
      ``[batch, ..., d_out]`` in the dtype of ``x``; sums are in float32 or wider.

    Raises:
      ValueError: Ranks, features or experts of the arguments differ.
    """
    experts, d_in, rank = a.shape
    if b.shape[:2] != (experts, rank):
        raise ValueError(f"b: expected [{experts}, {rank}, d_out] for a {a.shape}, got {b.shape}: another rank")
    if x.shape[-1] != d_in or probs.shape != (x.shape[0], experts):
        raise ValueError(
            f"x, probs: expected [batch, ..., {d_in}] and [batch, {experts}], got {x.shape} and {probs.shape}"
        )
    dtype = linalg.working_dtype(x)
    stacked = jnp.moveaxis(a, 0, 1).reshape(d_in, experts * rank).astype(x.dtype)
    inner = jnp.matmul(x, stacked, preferred_element_type=dtype)
    gates = jnp.repeat(probs.astype(dtype), rank, axis=-1)
    gates = jnp.broadcast_to(gates.reshape(len(x), *(1,) * (x.ndim - 2), experts * rank), inner.shape)
    outputs = jnp.matmul((inner * gates).astype(x.dtype), b.reshape(experts * rank, -1).astype(x.dtype))
    return outputs.astype(x.dtype)


def moe_lora_apply(
    x: jax.Array,
    router_in: jax.Array,
    w0: jax.Array,
    pool: ExpertPool,
    router: Router,
    scale: float,
    *,
    top_k: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A frozen kernel and routed low-rank experts: ``y = x w0 + scale sum_e p_e x a_e b_e``.

    Args:
      x: ``[batch, ..., d_in]``.
      router_in: ``[batch, d]``, such as the class token of each sequence.
      w0: The frozen kernel ``[d_in, d_out]``, an array or a structured weight.
      pool: The experts, without leading axes; those that are not ``active`` are not used.
      router: The router of the task.
      scale: Factor of all experts, ``alpha / rank``.
      top_k: See :func:`route`.

    Returns:
      ``(y [batch, ..., d_out], probs [batch, experts])``.

    Raises:
      ValueError: Shapes do not fit: rank, features, router width or number of experts.
    """
    if router_in.ndim != 2 or router_in.shape[0] != x.shape[0]:
        raise ValueError(f"router_in: expected [{x.shape[0]}, d], got {router_in.shape}")
    probs = route(router_in, router, pool.active, top_k)
    y = nn.linear(x, w0)
    update = apply_experts(x, pool.a, pool.b, probs)
    if update.shape != y.shape:
        raise ValueError(f"pool: experts give {update.shape[-1]} features, w0 gives {y.shape[-1]}")
    return y + jnp.asarray(scale, y.dtype) * update, probs


def subspace_penalty(probs: jax.Array, is_candidate: jax.Array) -> jax.Array:
    """The mean probability of candidates, which penalizes what is outside the historical subspace.

    Args:
      probs: ``[..., batch, experts]``; leading axes are layers.
      is_candidate: ``[..., experts]`` bool.

    Returns:
      A scalar in [0, 1]; 1 where there is no historical expert.  Its gradient with respect to the logits of an example
      is ``p_e (1[e is a candidate] - sum_c p_c)`` over the number of examples.
    """
    if is_candidate.shape != (*probs.shape[:-2], probs.shape[-1]):
        raise ValueError(f"is_candidate: expected {(*probs.shape[:-2], probs.shape[-1])}, got {is_candidate.shape}")
    return jnp.mean(jnp.sum(probs * is_candidate[..., None, :].astype(probs.dtype), axis=-1))


def complement_penalty(a: jax.Array, basis: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean share of ``||a_e||_F^2`` outside a subspace of inputs, the explicit form of the subspace constraint.

    Args:
      a: ``[experts, d_in, rank]``.
      basis: Orthonormal columns ``[d_in, q]``, zero columns allowed.
      weights: ``[experts]``, 1 for the experts that count.

    Returns:
      A scalar in [0, 1].
    """
    outside = a - linalg.times(basis, linalg.gram(basis, a))
    norms, parts = (jnp.sum(jnp.square(x), axis=(-2, -1)) for x in (a, outside))
    share = parts / jnp.where(norms > 0, norms, jnp.ones_like(norms))
    weights = weights.astype(share.dtype)
    return jnp.sum(share * weights) / jnp.maximum(jnp.sum(weights), 1)


def routing_change(before: jax.Array, now: jax.Array) -> jax.Array:
    """The largest total variation over layers between mean routing probabilities ``[..., experts]``."""
    return jnp.max(0.5 * jnp.sum(jnp.abs(now - before), axis=-1))


def router_converged(prev: jax.Array, new: jax.Array, tol: float) -> jax.Array:
    """Whether no layer's routing moved by ``tol`` in total variation since the window before.

    Args:
      prev: Mean routing probabilities ``[..., experts]`` of a window of steps.
      new: Those of the next one.
      tol: The tolerance.

    Returns:
      A bool.

    Raises:
      ValueError: The shapes differ.
    """
    if prev.shape != new.shape:
        raise ValueError(f"prev, new: expected one shape, got {prev.shape} and {new.shape}")
    return routing_change(prev, new) < tol


def historical_basis(
    pool: ExpertPool, energy: float = 0.95, max_rank: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The subspace of inputs that historical experts read.

    Of ``M`` columns of the historical ``a``, all left singular vectors are taken where ``M < d_in``; otherwise those
    before the one by which the share of the energy reaches ``energy``, and at least one.

    Args:
      pool: The pool; leading axes are layers.
      energy: The share, in (0, 1].
      max_rank: The most directions that are taken; no limit by default.

    Returns:
      Orthonormal columns ``[..., d_in, min(experts * rank, d_in)]``, zero beyond the first ``q``, float32 or wider, and
      ``q [...]``, int32.

    Raises:
      ValueError: ``energy`` is not in (0, 1], or ``max_rank`` is below 1.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy}")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank: expected at least 1, got {max_rank}")
    *lead, experts, d_in, rank = pool.a.shape
    a = jnp.where(pool.frozen[..., None, None], pool.a, jnp.zeros_like(pool.a))
    columns = jnp.moveaxis(a, -3, -2).reshape(*lead, d_in, experts * rank)
    q, s, _ = linalg.canonical_svd(columns.astype(linalg.working_dtype(columns)))
    count = jnp.sum(pool.frozen, axis=-1, dtype=jnp.int32) * rank
    share = jnp.cumsum(jnp.square(s), axis=-1)
    share = share / jnp.where(share[..., -1:] > 0, share[..., -1:], jnp.ones_like(share[..., -1:]))
    by_energy = jnp.maximum(jnp.sum(share < energy, axis=-1, dtype=jnp.int32), 1)
    dim = jnp.where(count < d_in, count, by_energy)
    dim = jnp.minimum(dim, min(s.shape[-1], max_rank or s.shape[-1]))
    inside = jax.lax.broadcasted_iota(jnp.int32, s.shape, s.ndim - 1) < dim[..., None]
    return jnp.where(inside[..., None, :], q, jnp.zeros_like(q)), dim


def orthogonal_complement_updates(basis: PyTree) -> optax.GradientTransformation:
    """Removes from updates of ``a`` what lies in a subspace of inputs: ``g - Q Q^T g``.

    Put one before Adam and one after it: its moments and its division bring removed directions back.  The bases are in
    the state, so that one compiled step serves all tasks; a new task's state is ``init`` of a new transform.

    Args:
      basis: Tree like the parameters of orthonormal columns ``[..., d_in, q]``, zero columns allowed, for parameters
        ``[..., experts, d_in, rank]``; or one array for a parameter.

    Returns:
      The transform.

    Raises:
      ValueError: ``update`` raises it where a basis does not fit an update.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax.continual import igsp
      >>> q = jax.numpy.eye(8)[:, :3]
      >>> project = igsp.orthogonal_complement_updates(q)
      >>> tx = optax.chain(project, optax.adam(1e-3), project)
    """

    def init(params):
        return OrthogonalComplementState(jax.tree.map(jnp.array, basis))  # two of them in a chain share no array

    def update(updates, state, params=None):
        def project(g, q):
            if g.ndim < 3 or q.shape != (*g.shape[:-3], g.shape[-2], q.shape[-1]):
                raise ValueError(
                    f"basis: expected [..., d_in, q] for a [..., experts, d_in, rank], got {q.shape} for {g.shape}"
                )
            dtype = linalg.working_dtype(g)
            q, wide = q[..., None, :, :].astype(dtype), g.astype(dtype)
            q = jnp.broadcast_to(q, (*g.shape[:-2], *q.shape[-2:]))
            return (wide - linalg.times(q, linalg.gram(q, wide))).astype(g.dtype)

        return jax.tree.map(project, updates, state.basis), state

    return optax.GradientTransformation(init, update)
