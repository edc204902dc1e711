"""Near-orthogonal kernels by a gradient that any optimizer can take (arXiv 2509.16664)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_jax import losses
from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic, spec_of

PyTree = Any


def add_lambda_orthogonality(weight: float, lam: float, kappa: float = 20.0) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of ``weight`` times :func:`subspace_jax.losses.lambda_orthogonality` to those of kernels.

    Kernels are the leaves of two axes and more, the last two of each matrix; ``optax.masked`` chooses among them.  Put
    it before an optimizer, as ``optax.add_decayed_weights``, and let no weight decay act on the same kernels: it pulls
    them to 0 instead.

    Args:
      weight: Factor of the penalty.
      lam: Threshold of the residual ``||W^T W - I||_F`` below which a kernel is left alone.
      kappa: Sharpness of the threshold; keep ``kappa lam`` at 10 or more.

    Returns:
      The transform; its state is empty.

    Raises:
      ValueError: A number is out of range; ``update`` raises it without parameters.
      TypeError: ``update`` raises it for a complex kernel.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax import optim
      >>> regularizer = optim.add_lambda_orthogonality(100.0, lam=1.0)
      >>> tx = optax.chain(optax.masked(regularizer, {"head": True, "body": False}), optax.adam(1e-3))
    """
    _checks.check_number("weight", weight, 0)
    _checks.check_number("lam", lam, 0)
    _checks.check_number("kappa", kappa, 0, closed=False)

    def add(update: jax.Array, w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return update

        def penalty(w):
            value = losses.lambda_orthogonality_tree(w, None, lam, kappa)
            return jnp.asarray(weight).astype(value.dtype) * value

        gradient = automatic(jax.grad(penalty), (w,), lambda: spec_of(w))
        return update + gradient.astype(update.dtype)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _checks.require_params(params, "the kernels that are to be near-orthogonal")
        _checks.check_real(params)
        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
