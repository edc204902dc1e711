"""Optimizers of factors where Gram matrices are singular: zero or dependent factors, and ranks above a side."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import optim

MAKERS = {
    "adaprelora": functools.partial(optim.adaprelora, 0.1, transport=True, stats="projected"),
    "adaprelora, undamped": functools.partial(
        optim.adaprelora, 0.1, damping_rel=0.0, damping_abs=0.0, eps_rel=0.0, stats="sum"
    ),
    "lora_plus": functools.partial(optim.lora_plus, 0.1),
    "scaled_gd_lora": functools.partial(optim.scaled_gd_lora, 0.1),
    "scaled_gd_lora, undamped": functools.partial(optim.scaled_gd_lora, 0.1, reg=0.0),
    "scaled_adamw_lora": functools.partial(optim.scaled_adamw_lora, 0.1, gauss_seidel=True),
    "lora_rite": functools.partial(optim.lora_rite, 0.1, escape=True, balance=True),
    "lora_pro": functools.partial(optim.lora_pro, 0.1),
    "lora_pro, undamped": functools.partial(optim.lora_pro, 0.1, delta=0.0, method="sgd"),
}
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def degenerate():
    """Layers whose b is zero, of which all is zero, and with equal columns; more rank than sides; sides of 1."""
    a, b = gaussian((4, 6, 2)), gaussian((4, 2, 5), 1)
    a = a.at[1].set(0).at[2, :, 1].set(a[2, :, 0])
    b = b.at[:2].set(0).at[3, 1].set(b[3, 0])
    wide = {"a": gaussian((3, 8), 2), "b": gaussian((8, 2), 3)}
    one = {"a": gaussian((1, 1), 4), "b": gaussian((1, 1), 5)}
    return {"stack": {"a": a, "b": b}, "wide": wide, "one": one}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_factors_of_any_rank_are_stepped(name):
    params = degenerate()
    if name == "lora_rite":
        del params["wide"]
    tx = MAKERS[name]()

    @quick_jit
    def step(size, seed, state):
        keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
        keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
        grads = jax.tree.map(lambda key, x: size * jax.random.normal(key, x.shape), keys, params)
        return tx.update(grads, state, params)

    fresh = tx.init(params)
    for size in (1.0, 1e20, 1e-20, 0.0):
        state = fresh
        for seed in range(3):
            updates, state = step(jnp.float32(size), seed, state)
            chex.assert_tree_all_finite((updates, state))
        if size == 0 and name != "lora_rite":  # which brings factors to one norm
            assert all(bool(jnp.all(x == 0)) for x in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.parametrize("reg", [0.0, 1e-6])
def test_scaled_gd_of_more_rank_than_outputs_follows_the_gradient(reg):
    """``b`` of rank above ``out`` reaches all of the weight: ``da b`` is the gradient itself, up to the ridge."""
    params, g = degenerate()["wide"], gaussian((3, 2), 6)
    grads = {"a": g @ params["b"].T, "b": params["a"].T @ g}
    tx = optim.scaled_gd_lora(1.0, reg=reg)
    updates, _ = tx.update(grads, tx.init(params), params)
    # Rounding errors over the least ridge, 16 eps of the trace, are of a few percent.
    np.testing.assert_allclose(updates["a"] @ params["b"], -g, atol=0.06)


@pytest.mark.slow
def test_lora_pro_of_more_rank_than_sides_follows_the_gradient():
    params, g = degenerate()["wide"], gaussian((3, 2), 6)
    grads = {"a": g @ params["b"].T, "b": params["a"].T @ g}
    tx = optim.lora_pro(1.0, method="sgd")
    updates, _ = tx.update(grads, tx.init(params), params)
    change = updates["a"] @ params["b"] + params["a"] @ updates["b"]
    np.testing.assert_allclose(change, -g, atol=0.06)  # as above


def test_adaprelora_goes_on_where_a_step_is_skipped_and_shows_it_where_not():
    params = {"q": {"a": gaussian((6, 2)), "b": gaussian((2, 5), 1)}}
    tx = optim.adaprelora(0.1, stats="projected")
    guarded = optax.apply_if_finite(tx, 5)
    bad = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), params)
    update = jax.jit(tx.update)
    updates, state = update(bad, tx.init(params), params)
    assert not jnp.any(jnp.isfinite(updates["q"]["a"][0, 0]))
    updates, _ = update(params, state, params)
    assert jnp.any(jnp.isnan(updates["q"]["a"]))
    guard = jax.jit(guarded.update)
    _, state = guard(bad, guarded.init(params), params)
    got, _ = guard(params, state, params)
    expected, _ = update(params, tx.init(params), params)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_lora_rite_moves_on_a_loss_that_is_summed():
    """Gradients of a sum over 10^6 examples: the same steps as of the mean, for nothing is skipped by its size."""
    params = {"q": {"a": gaussian((6, 2)), "b": gaussian((2, 5), 1)}}
    steps = []
    for size in (1.0, 1e6):
        tx = optim.lora_rite(0.1, clip_norm=None, eps=0.0)
        grads = jax.tree.map(lambda x, size=size: size * x, params)
        steps.append(jax.jit(tx.update)(grads, tx.init(params), params)[0])
    for x, y in zip(*map(jax.tree.leaves, steps), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)
        assert jnp.all(x != 0)
