"""Every method comes down to the minimum of a parabola in its own parameters, as Optax asks of its optimizers."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .registry import METHODS, orthonormal, pairs_of_factors

NUM_STEPS = 600

# What leaves a subspace alone ends where that lets it.
_HELD = {
    **dict.fromkeys(("project_out", "gradient_projection_memory"), (..., slice(2), slice(None))),
    "project_gradient": (..., slice(2)),
}


def loss_of(entry):
    """A loss whose minimum is zero, by the kind of the parameters."""
    start, rng = entry.params(), np.random.default_rng(5)
    target = jax.tree.map(lambda x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype), start)

    def squares(params):
        if entry.check is orthonormal:
            ends = jax.tree.map(lambda t: jnp.linalg.qr(t)[0], target)
            return sum(
                jnp.sum(jnp.square(s @ s.mT - e @ e.mT))
                for s, e in zip(jax.tree.leaves(params), jax.tree.leaves(ends), strict=True)
            )
        if entry.params is pairs_of_factors:
            q, goal = params["q"], target["q"]
            rest = jnp.sum(jnp.square(params["other"] - target["other"]))
            return jnp.sum(jnp.square(q["a"] @ q["b"] - goal["a"] @ goal["b"])) + rest
        if entry.public in _HELD:
            where = _HELD[entry.public]
            held = {name: x.at[where].set(0) if name != "embedding" else x for name, x in params.items()}
            goal = {name: x.at[where].set(0) if name != "embedding" else x for name, x in target.items()}
            return sum(jnp.sum(jnp.square(held[name] - goal[name])) for name in params)
        return sum(
            jnp.sum(jnp.square(x - t)) for x, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    return squares


def arguments_of(entry):
    return inspect.signature(entry.factory).parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [e for e in METHODS if e.public != "with_geometry" and not e.same_code], ids=lambda entry: entry.id
)
def test_a_parabola_is_descended(entry):
    """A twentieth of the loss is left; a rate that comes down to zero takes what noise Adam makes.

    Methods whose subspace moves slowly get to the rest by and by.
    """

    def rate(count):
        return 0.1 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / NUM_STEPS))

    penalties = {name: 0.0 for name in ("weight", "weight_decay") if name in arguments_of(entry)}
    tx = dataclasses.replace(entry, kwargs={**entry.kwargs, **penalties}).make(rate)
    loss, start = loss_of(entry), entry.params()

    @jax.jit
    def end():
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params, **entry.extra_args())
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), length=NUM_STEPS)[0][0]

    assert loss(end()) < 0.05 * loss(start)
