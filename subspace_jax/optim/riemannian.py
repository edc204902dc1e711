"""Stochastic gradient descent and Adam on Grassmann manifolds, as Optax transforms.

Every leaf of the parameters is a stack of orthonormal bases ``[..., n, k]``; leading axes are classes, layers or
whatever else there are many of.  Subspaces of several dimensions are several leaves.

The descent is that of "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation" (arXiv 2308.01547); momentum transports and Adam are the textbook forms (Absil, Mahony, Sepulchre,
"Optimization Algorithms on Matrix Manifolds"; Becigneul and Ganea, arXiv 1810.00760), with one second moment for each
subspace, so that the path does not depend on the basis that represents it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import linalg
from subspace_jax.manifolds import grassmann

PyTree = Any

TRANSPORTS = ("euclidean", "project", "parallel")


class RiemannianSGDState(NamedTuple):
    """State of :func:`riemannian_sgd`: steps taken, and momentum shaped like the bases (None without momentum)."""

    count: jax.Array
    momentum: PyTree


class RiemannianAdamState(NamedTuple):
    """State of :func:`riemannian_adam`: steps taken, first moments like the bases, one second moment a subspace."""

    count: jax.Array
    momentum: PyTree
    nu: PyTree


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

    A step moves ``S`` along the geodesic (or a retraction) whose velocity is the tangent part of the averaged
    gradients, and returns ``S_new - S``: ``optax.apply_updates`` lands on the manifold.  The default is the published
    algorithm with the sign of its periodic QR made positive, without which old momentum points the wrong way.

    Costs a few passes over bases, gradients and momentum and ``O(n k^2)`` operations a subspace; no ``n x k``
    decomposition.  State and arithmetic are float32 (float64 for float64 bases).  bfloat16 bases are stepped, but
    don't stay orthonormal beyond their own precision.

    Args:
      learning_rate: Number, or schedule of the step.
      momentum: Decay of the averaged gradients; None keeps no average and no memory for it.
      dampening: Gradients enter the average with weight ``1 - dampening`` from the second step on.
      transport: How the average follows the point.  "euclidean" averages the raw gradients and projects the sum;
        "project" projects the average to the tangent space of each new point; "parallel" carries it along the step.
      retraction: "exp" (the geodesic), "qr", "polar" or "cayley".
      reorth_every: Every so many steps, the first among them, drift is removed by QR; None never does.
      lr_factor: Multiplies the learning rate, so that one schedule can serve Euclidean parameters too.
      nesterov: Not defined for this method; refused.

    Returns:
      The transform.  Its ``update`` needs ``params``.

    Raises:
      ValueError: An option is unknown or out of range.  ``init`` raises it for leaves that are not orthonormal bases
        ``[..., n, k]``, ``update`` where ``params`` is missing.
      TypeError: ``init`` is given a leaf that is not floating point.

    Example:
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
        raise ValueError("nesterov: not defined on a manifold, where the look-ahead point has another tangent space")
    step_size = _scaled(learning_rate, lr_factor)
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
      step_size: Number, or schedule of the step; positive descends.
      momentum: See :func:`riemannian_sgd`.
      dampening: See :func:`riemannian_sgd`.
      transport: See :func:`riemannian_sgd`.
      retraction: See :func:`riemannian_sgd`.
      reorth_every: See :func:`riemannian_sgd`.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`riemannian_sgd`.
    """
    _check_options(transport, retraction, reorth_every)

    def init(params):
        _check_bases(params)
        zeros = None if momentum is None else jax.tree.map(_zeros_like, params)
        return RiemannianSGDState(jnp.zeros((), jnp.int32), zeros)

    def update(grads, state, params=None, **extra_args):
        del extra_args
        _require_params(params)
        size, reorth = _at(step_size, state.count), _is_due(reorth_every, state.count)

        def leaf(grad, s, m):
            s, grad, out = _working(s, grad)
            if m is None:
                direction = grassmann.tangent_project(s, grad)
            else:
                weight = jnp.where(state.count == 0, 1.0, 1.0 - _cast(dampening, s))
                if transport == "euclidean":
                    m = _cast(momentum, s) * m + weight * grad
                    direction = grassmann.tangent_project(s, m)
                else:
                    if transport == "project":
                        m = grassmann.tangent_project(s, m)
                    m = direction = _cast(momentum, s) * m + weight * grassmann.tangent_project(s, grad)
            new, m = _move(s, direction, m, size, transport, retraction)
            return _difference(s, new, reorth, out), m

        updates, moments = _map(leaf, params, grads, params, state.momentum)
        return updates, RiemannianSGDState(optax.safe_increment(state.count), moments)

    return optax.GradientTransformationExtraArgs(init, update)


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

    The second moment is one number for each subspace, the running mean of the squared entries of its tangent
    gradient: entrywise moments would make the path depend on the basis.

    Args:
      learning_rate: Number, or schedule of the step.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      transport: See :func:`riemannian_sgd`.
      retraction: See :func:`riemannian_sgd`.
      reorth_every: See :func:`riemannian_sgd`.
      lr_factor: Multiplies the learning rate.

    Returns:
      The transform.  Its ``update`` needs ``params``.

    Raises:
      ValueError: See :func:`riemannian_sgd`.
      TypeError: See :func:`riemannian_sgd`.
    """
    step_size = _scaled(learning_rate, lr_factor)
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
      step_size: Number, or schedule of the step; positive descends.
      b1: See :func:`riemannian_adam`.
      b2: See :func:`riemannian_adam`.
      eps: See :func:`riemannian_adam`.
      transport: See :func:`riemannian_sgd`.
      retraction: See :func:`riemannian_sgd`.
      reorth_every: See :func:`riemannian_sgd`.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`riemannian_sgd`.
    """
    _check_options(transport, retraction, reorth_every)

    def init(params):
        _check_bases(params)
        nu = jax.tree.map(lambda s: jnp.zeros(s.shape[:-2], linalg.working_dtype(s)), params)
        return RiemannianAdamState(jnp.zeros((), jnp.int32), jax.tree.map(_zeros_like, params), nu)

    def update(grads, state, params=None, **extra_args):
        del extra_args
        _require_params(params)
        size, reorth = _at(step_size, state.count), _is_due(reorth_every, state.count)
        count = optax.safe_increment(state.count)

        def leaf(grad, s, m, nu):
            s, grad, out = _working(s, grad)
            first, second, t = _cast(b1, s), _cast(b2, s), count.astype(s.dtype)
            tangent = grassmann.tangent_project(s, grad)
            if transport == "project":
                m = grassmann.tangent_project(s, m)
            m = first * m + (1 - first) * (grad if transport == "euclidean" else tangent)
            nu = second * nu + (1 - second) * jnp.mean(jnp.square(tangent), axis=(-2, -1))
            scale = (1 / (1 - first**t)) / (jnp.sqrt(nu / (1 - second**t)) + _cast(eps, s))
            direction = grassmann.tangent_project(s, m) if transport == "euclidean" else m
            new, m = _move(s, scale[..., None, None] * direction, m, size, transport, retraction)
            return _difference(s, new, reorth, out), m, nu

        updates, moments, nus = _map(leaf, params, grads, params, state.momentum, state.nu)
        return updates, RiemannianAdamState(count, moments, nus)

    return optax.GradientTransformationExtraArgs(init, update)


def _move(s, direction, m, size, transport, retraction):
    """Steps by ``-size * direction`` and brings the stored vector to the new point."""
    velocity = -_cast(size, s) * direction
    new = grassmann.retract(s, velocity, retraction)
    if m is None:
        return new, None
    if transport == "parallel":
        m = grassmann.parallel_transport(s, velocity, m)
    if retraction == "qr":
        # This retraction turns the basis, and vectors stored in the old one have to turn with it.
        m = linalg.times(m, grassmann.align(s, new))
    if transport == "parallel" and retraction != "exp":
        m = grassmann.tangent_project(new, m)
    return new, m


def _difference(s, new, reorth, out_dtype):
    if reorth is not None:
        new = jax.lax.cond(reorth, grassmann.reorthonormalize, lambda s: s, new)
    return (new - s).astype(out_dtype)


def _is_due(reorth_every, count):
    return None if reorth_every is None else count % jnp.asarray(reorth_every).astype(count.dtype) == 0


def _scaled(learning_rate, factor):
    if callable(learning_rate):
        return lambda count: learning_rate(count) * factor
    return learning_rate * factor


def _at(step_size, count):
    return step_size(count) if callable(step_size) else step_size


def _cast(value, like):
    return jnp.asarray(value).astype(like.dtype)


def _working(s, grad):
    dtype = linalg.working_dtype(s)
    return s.astype(dtype), grad.astype(dtype), s.dtype


def _zeros_like(s):
    return jnp.zeros(s.shape, linalg.working_dtype(s))


def _map(f, like, *trees):
    """Applies a function of leaves that returns a tuple, and returns a tuple of trees; a tree may be None."""
    leaves, structure = jax.tree.flatten(like)
    columns = [[None] * len(leaves) if tree is None else structure.flatten_up_to(tree) for tree in trees]
    results = [f(*row) for row in zip(*columns, strict=True)]
    width = len(results[0]) if results else len(trees) - 1
    outs = [[row[i] for row in results] for i in range(width)]
    return tuple(None if out and out[0] is None else structure.unflatten(out) for out in outs)


def _require_params(params):
    if params is None:
        raise ValueError("update: params is missing; a step on a manifold starts from the current bases")


def _check_options(transport, retraction, reorth_every):
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {TRANSPORTS}, got {transport!r}")
    if retraction not in grassmann.RETRACTIONS:
        raise ValueError(f"retraction: expected one of {grassmann.RETRACTIONS}, got {retraction!r}")
    if isinstance(reorth_every, int | np.integer) and reorth_every < 1:
        raise ValueError(f"reorth_every: expected at least 1, or None for never, got {reorth_every}")


def _check_bases(params):
    """Refuses what is no stack of bases; orthonormality can only be looked at where values are at hand."""
    for path, s in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        if not jnp.issubdtype(s.dtype, jnp.floating):
            raise TypeError(f"{name}: expected floating-point bases, got {s.dtype}")
        if s.ndim < 2 or s.shape[-1] > s.shape[-2] or s.shape[-1] < 1:
            raise ValueError(f"{name}: expected bases [..., n, k] with 1 <= k <= n, got {s.shape}")
        if isinstance(s, jax.Array | np.ndarray) and not isinstance(s, jax.core.Tracer):
            # Entries of bfloat16 bases are rounded to 2^-9, which alone gives an error of a few percent.
            limit = 1e-3 if jnp.finfo(s.dtype).bits >= 32 else 0.1
            error = float(jnp.max(linalg.orthonormality_error(jnp.asarray(s))))
            if not error <= limit:
                raise ValueError(
                    f"{name}: the columns are not orthonormal (||S^T S - I|| = {error:.2g}, expected at most {limit}); "
                    "start from manifolds.grassmann.random_point or a QR factor"
                )
