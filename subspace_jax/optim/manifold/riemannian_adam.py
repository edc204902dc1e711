"""Adam on Grassmann manifolds, as an Optax transform.

The form is that of Becigneul and Ganea, "Riemannian Adaptive Optimization Methods" (arXiv 1810.00760), with each
subspace a factor of its own, so that it has one second moment: entrywise ones would make the path depend on the basis.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.kernels.grassmann_step.api import move, tangent_part
from subspace_jax.optim import _checks
from subspace_jax.optim.manifold import _step as _manifold_step

PyTree = Any


class RiemannianAdamState(NamedTuple):
    """State of :func:`riemannian_adam`.

    Attributes:
      count: Steps taken, int32 scalar.
      momentum: First moments, tree of ``[..., n, k]`` like the bases, float32 (float64 for float64 bases).
      nu: Second moments, one number for each subspace: the leading shape ``[...]`` of the leaf, same dtype.
    """

    count: jax.Array
    momentum: PyTree
    nu: PyTree


def riemannian_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    transport: str = "parallel",
    retraction: str = "exp",
    reorth_every: int | jax.Array | None = 5,
    lr_factor: float | jax.Array = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam on Grassmann manifolds.

    Both moments average tangent gradients; the second is one number for each subspace, the running mean of their
    squared entries.  Leaves, dtypes, precision and cost are as for :func:`riemannian_sgd`, with one projection more.

    Args:
      learning_rate: Fixed learning rate or schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      transport: How the first moment follows the point.  "parallel" carries it along the step; "project" projects it
        to the tangent space of each new point; "euclidean" leaves it as it is, and only its tangent part is used.
      retraction: "exp" (the geodesic), "qr", "polar" or "cayley".
      reorth_every: Every so many steps, the first among them, drift is removed by QR; None never does.
      lr_factor: Multiplies the learning rate, so that one schedule can serve Euclidean parameters too.

    Returns:
      The transform.  Its ``update`` needs ``params``, and takes ``shardings`` as that of :func:`riemannian_sgd` does.

    Raises:
      ValueError: See :func:`riemannian_sgd`.
      TypeError: See :func:`riemannian_sgd`.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax import optim
      >>> from subspace_jax.manifolds import grassmann
      >>> tx = optim.riemannian_adam(1e-2)
      >>> bases = grassmann.random_point(jax.random.key(0), n=6, k=2, batch_shape=(3,))
      >>> state = tx.init(bases)
      >>> state.nu.shape
      (3,)
      >>> updates, state = tx.update(jax.numpy.ones_like(bases), state, bases)
      >>> bases = optax.apply_updates(bases, updates)
    """
    step_size = _manifold_step.scaled(learning_rate, lr_factor)
    return scale_by_riemannian_adam(step_size, b1, b2, eps, transport, retraction, reorth_every)


def scale_by_riemannian_adam(
    step_size: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    transport: str = "parallel",
    retraction: str = "exp",
    reorth_every: int | jax.Array | None = 5,
) -> optax.GradientTransformationExtraArgs:
    """The update of :func:`riemannian_adam` for use in a chain; see :func:`scale_by_riemannian_sgd`.

    Args:
      step_size: Fixed step size or schedule; positive descends.
      b1: See :func:`riemannian_adam`.
      b2: See :func:`riemannian_adam`.
      eps: See :func:`riemannian_adam`.
      transport: See :func:`riemannian_adam`.
      retraction: See :func:`riemannian_sgd`.
      reorth_every: See :func:`riemannian_sgd`.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`riemannian_sgd`.
      TypeError: See :func:`riemannian_sgd`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optax.clip_by_global_norm(5.0), optim.scale_by_riemannian_adam(1e-2))
    """
    _manifold_step.check_options(transport, retraction, reorth_every)
    _checks.check_rate("step_size", step_size)
    _checks.check_moments(b1, b2, eps)

    def init(params):
        _manifold_step.check_bases(params)
        zeros, nu = _manifold_step.zero_moments(params), _manifold_step.zero_per_subspace(params)
        return RiemannianAdamState(jnp.zeros((), jnp.int32), zeros, nu)

    how = {"transport": transport, "retraction": retraction}

    def leaf(due, scalars, sharding, grad, s, m, nu):
        b1, b2, t = scalars["b1"], scalars["b2"], scalars["t"]
        grad = tangent_part(s, grad, sharding)
        m = b1 * m + (1 - b1) * grad
        nu = b2 * nu + (1 - b2) * jnp.mean(jnp.square(grad), axis=(-2, -1))
        scale = (1 / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + scalars["eps"])
        # The step projects once more.  Where the gradient is all but normal to the manifold, its tangent part is
        # rounding noise that is as large along S, and the scale blows it up to a full step; a projection of the
        # projection is tangent to its own precision.
        size = scalars["step_size"] * scale
        update, m = move(s, m, size=size, due=due, sharding=sharding, **how)
        return update, m, nu

    def update(updates, state, params=None, *, shardings=None, **extra_args):
        del extra_args
        _checks.require_params(params, "the current bases, from which a step on a manifold starts")
        count = optax.safe_increment(state.count)
        size = _manifold_step.value_at(step_size, state.count)
        scalars = {"step_size": size, "b1": b1, "b2": b2, "eps": eps, "t": count}
        due = _manifold_step.is_due(reorth_every, state.count)
        updates, m, nu = _manifold_step.step_leaves(
            leaf, due, scalars, shardings, updates, params, state.momentum, state.nu
        )
        return updates, RiemannianAdamState(count, m, nu)

    return optax.GradientTransformationExtraArgs(init, update)
