"""Adam without correction of the second moment inside the root, and the descent step that all methods share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _checks

PyTree = Any


class AdamState(NamedTuple):
    """Moments of Adam.

    Attributes:
      count: Steps taken, int32 scalar.
      mu: First moments, tree of arrays.
      nu: Second moments, tree of arrays.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree


class DescentState(NamedTuple):
    """State of :func:`descend`: the number of steps taken, int32 scalar."""

    count: jax.Array


def moments(r, mu, nu, b1, b2, eps):
    """New moments and ``N = mu / (sqrt(nu) + eps)``, which is not bias-corrected, eps outside the root."""
    b1, b2, eps = (jnp.asarray(x).astype(mu.dtype) for x in (b1, b2, eps))
    r = squarable(r)
    mu = b1 * mu + (1 - b1) * r
    nu = b2 * nu + (1 - b2) * jnp.square(r)
    return mu, nu, mu / (jnp.sqrt(nu) + eps)


def squarable(x: jax.Array) -> jax.Array:
    """Clips entries to those whose squares are finite; entries that are not finite stay.

    A second moment that overflows once stays infinite, and every later step is zero.
    """
    largest = float(jnp.finfo(x.dtype).max) ** 0.5
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


def bounded(*gradients: jax.Array) -> list[jax.Array]:
    """Gradients ``[..., m, n]``, scaled by one factor for each matrix so that no entry is above 1e9 (1e76 in float64).

    Products of four of them are finite.  An infinite entry becomes NaN.
    """
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True) for g in gradients])
    limit = 0.25 * float(jnp.finfo(linalg.working_dtype(largest)).max) ** 0.25
    share = limit / jnp.maximum(largest.astype(linalg.working_dtype(largest)), limit)
    return [g * share.astype(g.dtype) for g in gradients]


def correction(count, b1, b2, dtype):
    """The factor ``sqrt(1 - b2^t) / (1 - b1^t)`` for ``t`` steps taken, the present one included."""
    b1, b2, t = jnp.asarray(b1).astype(dtype), jnp.asarray(b2).astype(dtype), count.astype(dtype)
    return jnp.sqrt(1 - b2**t) / (1 - b1**t)


def scale_by_plain_adam(b1: ArrayLike, b2: ArrayLike, eps: ArrayLike) -> optax.GradientTransformation:
    """Adam with ``eps`` added to the root of the raw second moment: ``c mu / (sqrt(nu) + eps)``.

    ``optax.scale_by_adam`` adds it to the root of the corrected one.
    """

    def init(params):
        _checks.check_real(params)

        def zeros():
            return jax.tree.map(lambda x: jnp.zeros_like(x, linalg.working_dtype(x)), params)

        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        leaves, structure = jax.tree.flatten(updates)
        columns = (structure.flatten_up_to(state.mu), structure.flatten_up_to(state.nu))
        steps = [moments(r.astype(mu.dtype), mu, nu, b1, b2, eps) for r, mu, nu in zip(leaves, *columns, strict=True)]
        updates = [correction(count, b1, b2, n.dtype) * n for _, _, n in steps]
        mu, nu = (structure.unflatten([step[i] for step in steps]) for i in range(2))
        return structure.unflatten(updates), AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def descend(
    learning_rate: optax.ScalarOrSchedule, weight_decay: ArrayLike, *, after: bool = True
) -> optax.GradientTransformation:
    """``W <- (W - lr D) (1 - lr wd)``: the decay comes after the step, as in the reference code of most methods.

    Else ``W <- W (1 - lr wd) - lr D``.
    """
    _checks.check_rate("learning_rate", learning_rate)
    _checks.check_number("weight_decay", weight_decay, 0)
    # A number that is an array is not looked at: that would wait for the device.
    decays = not isinstance(weight_decay, int | float) or weight_decay != 0

    def init(params):
        del params
        return DescentState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if decays:
            _checks.require_params(params, "the current parameters, which weight decay needs")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def leaf(d, w=None):
            dtype = linalg.working_dtype(d)
            lr = jnp.asarray(rate).astype(dtype)
            step = -lr * d.astype(dtype)
            if w is not None:
                decayed = w.astype(dtype) + step if after else w.astype(dtype)
                step = step - lr * jnp.asarray(weight_decay).astype(dtype) * decayed
            return step.astype(d.dtype)

        trees = (updates, params) if decays else (updates,)
        return jax.tree.map(leaf, *trees), DescentState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def then_descend(
    tx: optax.GradientTransformationExtraArgs, learning_rate: optax.ScalarOrSchedule, weight_decay: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """``tx`` and :func:`descend`, which reads the step from the ``count`` of ``tx``'s state and has no state."""
    descent = descend(learning_rate, weight_decay)

    def update(updates, state, params=None, **extra_args):
        directions, after = tx.update(updates, state, params, **extra_args)
        return descent.update(directions, DescentState(state.count), params)[0], after

    return optax.GradientTransformationExtraArgs(tx.init, update)
