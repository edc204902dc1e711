"""What Gradient Projection Memory promises, beyond the contract of all transforms and the golden vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import linalg, optim


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_outputs_for_remembered_inputs_do_not_move():
    """Stacks of layers, each with a memory of its own, and a bias that is trained as ever."""
    inputs = gaussian((2, 9, 3)) @ gaussian((2, 3, 20), 1)
    memory = jax.jit(optim.gpm_update, static_argnums=2)(None, inputs, 0.9999999)
    params = {"kernel": gaussian((2, 9, 4), 2), "bias": jnp.zeros(4)}
    tx = optim.gradient_projection_memory(0.1, {"kernel": memory, "bias": None})
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(memory.basis.mT @ updates["kernel"], 0, atol=1e-6)
    assert float(jnp.max(jnp.abs(updates["kernel"]))) > 0.01
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-6)


@pytest.mark.slow
def test_memory_stays_orthonormal_and_never_overflows():
    memory, update = None, jax.jit(optim.gpm_update, static_argnums=2)
    for i in range(4):
        memory = update(memory, gaussian((6, 10), i), 0.9)
        used = memory.basis[:, : int(memory.dim)]
        assert linalg.orthonormality_error(used) < 1e-5
        assert not np.any(memory.basis[:, int(memory.dim) :])
    assert memory.dim <= 6


@pytest.mark.slow
def test_inputs_that_are_held_already_add_nothing():
    inputs = gaussian((6, 2)) @ gaussian((2, 10), 1)
    memory = optim.gpm_update(None, inputs, 0.999)
    again = optim.gpm_update(memory._replace(dim=memory.dim), memory.basis[:, : int(memory.dim)], 0.99)
    assert int(again.dim) == int(memory.dim)


def test_a_rule_names_bases_by_path():
    params = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((4, 3))}}
    tx = optim.project_out(lambda path, shape: jnp.eye(4, 1) if path == "a/kernel" else None)
    updates, state = tx.update(params, tx.init(params))
    assert state == optax.EmptyState()
    np.testing.assert_array_equal(updates["a"]["kernel"][0], 0)
    np.testing.assert_array_equal(updates["b"]["kernel"], 1)


def test_bad_input_is_refused():
    g = jnp.ones((4, 3))
    tx = optim.project_out({"kernel": jnp.ones((5, 1))})
    with pytest.raises(ValueError, match=r"bases: expected .* kernel of shape \(4, 3\)"):
        tx.update({"kernel": g}, tx.init({"kernel": g}))
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            optim.gpm_update(None, g, threshold)
    with pytest.raises(ValueError, match="activations"):
        optim.gpm_update(optim.gpm_update(None, g, 0.9), jnp.ones((5, 3)), 0.9)
