"""Stochastic gradient descent on Grassmann manifolds, as an Optax transform.

The method is that of "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation" (arXiv 2308.01547); the transports of momentum are the textbook forms (Absil, Mahony, Sepulchre,
"Optimization Algorithms on Matrix Manifolds", 2008).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.kernels.grassmann_step.api import move
from subspace_jax.optim import _checks
from subspace_jax.optim.manifold import _step as _manifold_step

PyTree = Any


class RiemannianSGDState(NamedTuple):
    """State of :func:`riemannian_sgd`.

    Attributes:
      count: Steps taken, int32 scalar.
      momentum: Tree of ``[..., n, k]`` like the bases, float32 (float64 for float64 bases); None without momentum.
    """

    count: jax.Array
    momentum: PyTree


def riemannian_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | jax.Array | None = 0.9,
    dampening: float | jax.Array = 0.0,
    transport: str = "euclidean",
    retraction: str = "exp",
    reorth_every: int | jax.Array | None = 5,
    lr_factor: float | jax.Array = 1.0,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent on Grassmann manifolds.

    Every leaf of the parameters is a stack of orthonormal bases ``[..., n, k]``: leading axes are classes, layers or
    whatever else there are many of, and subspaces of several dimensions are several leaves.  A step moves ``S`` along
    the geodesic (or a retraction) whose velocity is the tangent part of the averaged gradients, and returns
    ``S_new - S``: ``optax.apply_updates`` lands on the manifold.  The default is the published algorithm with the
    signs of its periodic QR made positive, without which old momentum points the wrong way.

    Costs a few passes over bases, gradients and momentum, about ``10 n k^2`` operations and some of ``k x k`` matrices
    for a subspace; there is no ``n x k`` decomposition.  State and arithmetic are float32 (float64 for float64 bases).
    float32 bases stay orthonormal to 1e-6 after every step, more in proportion where steps turn by radians or the
    part of the gradient that is normal to the manifold, times the step size, is large against 1.  bfloat16 bases are
    stepped, but are orthonormal only to their own precision: keep float32 masters.

    Args:
      learning_rate: Fixed learning rate or schedule; negative ascends.
      momentum: Decay of the averaged gradients; None keeps no average and no memory for it.
      dampening: Gradients enter the average with weight ``1 - dampening`` from the second step on.
      transport: How the average follows the point.  "euclidean" averages the raw gradients and projects the sum;
        "project" projects the average to the tangent space of each new point; "parallel" carries it along the step.
      retraction: "exp" (the geodesic), "qr", "polar" or "cayley".
      reorth_every: Every so many steps, the first among them, drift is removed by QR; None never does.
      lr_factor: Multiplies the learning rate, so that one schedule can serve Euclidean parameters too.
      nesterov: Not defined for this method; refused.

    Returns:
      The transform.  Its ``update`` needs ``params``.  Under a mesh of Auto axes it may be given ``shardings``, a tree
      of ``NamedSharding`` like the parameters: every device then steps the bases that it holds, on TPUs by the kernel,
      where a compiler left to itself would take the reference.

    Raises:
      ValueError: An option is unknown or out of range.  ``init`` raises it for leaves that are not orthonormal bases
        ``[..., n, k]``, ``update`` where ``params`` is missing.
      TypeError: ``init`` is given a leaf that is not floating point.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax import optim
      >>> from subspace_jax.manifolds import grassmann
      >>> tx = optim.riemannian_sgd(0.1)
      >>> bases = grassmann.random_point(jax.random.key(0), n=6, k=2, batch_shape=(3,))
      >>> state = tx.init(bases)
      >>> updates, state = tx.update(jax.numpy.ones_like(bases), state, bases)
      >>> bases = optax.apply_updates(bases, updates)
      >>> bool(jax.numpy.max(grassmann.orthonormality_error(bases)) < 1e-6)
      True
    """
    if nesterov:
        raise ValueError(
            f"nesterov: expected False, got {nesterov!r}; the look-ahead point has another tangent space, "
            "and the method does not define it"
        )
    step_size = _manifold_step.scaled(learning_rate, lr_factor)
    return scale_by_riemannian_sgd(step_size, momentum, dampening, transport, retraction, reorth_every)


def scale_by_riemannian_sgd(
    step_size: optax.ScalarOrSchedule,
    momentum: float | jax.Array | None = 0.9,
    dampening: float | jax.Array = 0.0,
    transport: str = "euclidean",
    retraction: str = "exp",
    reorth_every: int | jax.Array | None = 5,
) -> optax.GradientTransformationExtraArgs:
    """The update of :func:`riemannian_sgd` for use in a chain.

    A step on a manifold is not linear in its length, so the length is an argument here and can't be multiplied on
    afterwards: put what scales gradients before this transform, and nothing after it.

    Args:
      step_size: Fixed step size or schedule; positive descends.
      momentum: See :func:`riemannian_sgd`.
      dampening: See :func:`riemannian_sgd`.
      transport: See :func:`riemannian_sgd`.
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
      >>> tx = optax.chain(optax.clip_by_global_norm(5.0), optim.scale_by_riemannian_sgd(0.1, transport="parallel"))
    """
    _manifold_step.check_options(transport, retraction, reorth_every)
    _checks.check_rate("step_size", step_size)
    if momentum is not None:
        _checks.check_number("momentum", momentum, 0, 1)
    _checks.check_number("dampening", dampening, 0, 1)

    def init(params):
        _manifold_step.check_bases(params)
        buffer = None if momentum is None else _manifold_step.zero_moments(params)
        return RiemannianSGDState(jnp.zeros((), jnp.int32), buffer)

    how = {"transport": transport, "retraction": retraction}

    def leaf(due, scalars, sharding, grad, s, m):
        rates = {} if m is None else {"decay": scalars["momentum"], "weight": scalars["weight"]}
        # Averages of tangent gradients need no projection here: projecting the sum, as the step does, is the same.
        update, carried = move(s, grad, m, size=scalars["step_size"], due=due, sharding=sharding, **how, **rates)
        return update, None if m is None else carried

    def update(updates, state, params=None, *, shardings=None, **extra_args):
        del extra_args
        _checks.require_params(params, "the current bases, from which a step on a manifold starts")
        scalars = {"step_size": _manifold_step.value_at(step_size, state.count)}
        if momentum is not None:
            scalars |= {"momentum": momentum, "weight": jnp.where(state.count == 0, 1.0, 1.0 - dampening)}
        due = _manifold_step.is_due(reorth_every, state.count)
        updates, buffer = _manifold_step.step_leaves(leaf, due, scalars, shardings, updates, params, state.momentum)
        return updates, RiemannianSGDState(optax.safe_increment(state.count), buffer)

    return optax.GradientTransformationExtraArgs(init, update)
