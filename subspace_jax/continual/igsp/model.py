"""Routed experts as a structured weight, which any model of the library takes, and as a Flax layer."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax import nn
from subspace_jax.continual.igsp.core import Router, apply_experts, masked_softmax, moe_lora_apply, route
from subspace_jax.continual.igsp.pool import ExpertPool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertKernel(nn.StructuredWeight):
    """A frozen kernel beside which routed low-rank experts run; stacked layers have a leading axis.

    The router reads the input itself, of sequences the first token.  In training, ``penalty`` adds its gradient to that
    of the loss, and ``probe``, zeros, gets the routing probabilities as its gradient: so any model that calls
    :func:`subspace_jax.nn.linear` is trained and measured as it is, through scans and rematerialization.

    Attributes:
      base: The kernel ``[d_in, d_out]``.
      a: ``[experts, d_in, rank]``.
      b: ``[experts, rank, d_out]``.
      router: The router; of several tasks, with ``task``, its arrays have an axis of tasks in front.
      mask: ``[experts]`` bool, the experts that may be used; with ``task`` ``[tasks, experts]``.
      task: Integers ``[batch]``, the task by whose router each example goes; -1 for the frozen kernel alone.
      penalty: ``[experts]``, the gradient of the loss with respect to each expert's mean probability.
      probe: Zeros ``[batch, experts]``.
      scale: Factor of all experts.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    router: Router
    mask: jax.Array
    task: jax.Array | None = None
    penalty: jax.Array | None = None
    probe: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns the outputs for ``x [batch, d_in]`` or ``[batch, tokens, d_in]``."""
        if x.ndim not in (2, 3):
            raise ValueError(f"x: expected [batch, d_in] or [batch, tokens, d_in], got {x.shape}")
        probs = self.probs(x if x.ndim == 2 else x[:, 0])
        if self.probe is not None:
            probs = _observed(probs, self.probe, self.penalty)
        update = apply_experts(x, self.a, self.b, probs)
        return nn.linear(x, self.base) + jnp.asarray(self.scale, x.dtype) * update

    def probs(self, router_in: jax.Array) -> jax.Array:
        """Returns the routing probabilities ``[batch, experts]`` of ``router_in [batch, d]``."""
        if self.task is None:
            return route(router_in, self.router, self.mask)
        dtype = self.router.bias.dtype
        which = jnp.maximum(self.task, 0)
        logits = self.router.bias[which]
        if self.router.kernel is not None:
            every = jnp.einsum("bd,tde->bte", router_in.astype(dtype), self.router.kernel)
            logits = logits + jnp.take_along_axis(every, which[:, None, None], axis=1)[:, 0]
        return masked_softmax(logits, self.mask[which] & (self.task >= 0)[:, None])


@jax.custom_vjp
def _observed(probs: jax.Array, probe: jax.Array, penalty: jax.Array) -> jax.Array:
    """Returns ``probs``; its gradient adds the penalty's, and that of ``probe`` is ``probs``."""
    return probs


def _observed_fwd(probs, probe, penalty):
    return probs, (probs, penalty)


def _observed_bwd(saved, g):
    probs, penalty = saved
    own = jnp.broadcast_to(penalty.astype(g.dtype) / probs.shape[0], g.shape)
    return g + own, probs, jnp.zeros_like(penalty)


_observed.defvjp(_observed_fwd, _observed_bwd)


class MoELoRADense(nnx.Module):
    """A frozen kernel with routed low-rank experts, as a layer without state of its own but the kernel.

    The pool and the router are arguments, since tasks change them and a task's router belongs to the task.

    Args:
      features: Features of the output.
      rank: Rank of an expert.
      max_experts: Slots of the pool.
      scale: Factor of all experts, ``alpha / rank``.
      top_k: Experts that an example uses in evaluation; all by default.  Training always uses all: candidates would
        otherwise be locked out before they learn.
      kernel: The frozen kernel ``[d_in, features]``.

    Raises:
      ValueError: A number is below 1, or the kernel has another width.
    """

    def __init__(
        self, features: int, rank: int, max_experts: int, scale: float, top_k: int | None = None, *, kernel: jax.Array
    ):
        for name, size in (("features", features), ("rank", rank), ("max_experts", max_experts)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if kernel.ndim != 2 or kernel.shape[1] != features:
            raise ValueError(f"kernel: expected [d_in, {features}], got {kernel.shape}")
        if top_k is not None and not 1 <= top_k <= max_experts:
            raise ValueError(f"top_k: expected 1 to {max_experts} experts, got {top_k}")
        self.kernel = nnx.Variable(kernel)
        self.features, self.rank, self.max_experts = features, rank, max_experts
        self.scale, self.top_k = scale, top_k

    def __call__(
        self, x: jax.Array, router_input: jax.Array, pool: ExpertPool, router: Router, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Applies the layer.

        Args:
          x: ``[batch, ..., d_in]``.
          router_input: ``[batch, d]``.
          pool: The experts.
          router: The router of the task.
          train: Whether all experts are used whatever ``top_k`` says.

        Returns:
          ``(y [batch, ..., features], probs [batch, max_experts])``.

        Raises:
          ValueError: The pool has another rank or number of experts, or shapes do not fit.
        """
        experts, _, rank = pool.a.shape
        if (experts, rank) != (self.max_experts, self.rank):
            raise ValueError(
                f"pool: expected {self.max_experts} experts of rank {self.rank}, got {experts} of rank {rank}"
            )
        top_k = None if train else self.top_k
        kernel = self.kernel.get_value()
        return moe_lora_apply(x, router_input, kernel, pool, router, self.scale, top_k=top_k)
