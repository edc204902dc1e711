"""What ``project_gradient`` keeps, beyond the contract of all transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import optim


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def columns(shape, seed=1):
    return jnp.asarray(np.linalg.qr(gaussian(shape, seed))[0])


@pytest.mark.parametrize(("side", "n"), [("output", 4), ("input", 9)])
def test_project_gradient_divides_a_gradient_into_its_two_parts(side, n):
    g = {"kernel": gaussian((2, 9, 4)), "bias": jnp.ones(4)}
    bases = {"kernel": columns((2, n, 2)), "bias": None}
    parts = [optim.project_gradient(bases, mode, side).update(g, optax.EmptyState())[0] for mode in ("same", "orth")]
    same, orth = (x["kernel"] for x in parts)
    np.testing.assert_allclose(same + orth, g["kernel"], atol=1e-6)
    basis = bases["kernel"]
    expected = g["kernel"] @ basis @ basis.mT if side == "output" else basis @ (basis.mT @ g["kernel"])
    np.testing.assert_allclose(same, expected, atol=1e-5)
    for part in parts:
        np.testing.assert_array_equal(part["bias"], 1)


def test_project_gradient_orth_of_inputs_is_project_out():
    g, basis = {"kernel": gaussian((9, 4))}, {"kernel": columns((9, 3))}
    got, state = optim.project_gradient(basis, "orth", "input").update(g, optax.EmptyState())
    want, _ = optim.project_out(basis).update(g, optax.EmptyState())
    np.testing.assert_allclose(got["kernel"], want["kernel"], atol=1e-6)
    assert state == optax.EmptyState()


def test_project_gradient_keeps_steps_of_sgd_in_the_subspace():
    kernel, basis = gaussian((9, 4)), columns((4, 2))
    tx = optax.chain(optim.project_gradient(lambda path, shape: basis, "same"), optax.sgd(0.1))

    def step(kernel, _):
        updates, _ = tx.update(jax.grad(lambda w: jnp.sum(jnp.sin(w)))(kernel), tx.init(kernel))
        return kernel + updates, None

    moved = jax.jit(lambda w: jax.lax.scan(step, w, length=5)[0])(kernel) - kernel
    assert np.abs(moved).max() > 0.1
    np.testing.assert_allclose(moved - moved @ basis @ basis.T, 0, atol=1e-6)


def test_project_gradient_refuses_bad_input():
    with pytest.raises(ValueError, match="mode: expected one of"):
        optim.project_gradient(None, "opp")
    with pytest.raises(ValueError, match="side: expected one of"):
        optim.project_gradient(None, side="left")
    tx = optim.project_gradient({"kernel": jnp.ones((9, 1))})
    with pytest.raises(ValueError, match=r"bases: expected \[..., out, k\] for the kernel kernel .* \(9, 4\)"):
        tx.update({"kernel": jnp.ones((9, 4))}, optax.EmptyState())
    with pytest.raises(ValueError, match="bases: expected"):
        tx.update({"kernel": jnp.ones(9)}, optax.EmptyState())
    with pytest.raises(TypeError, match="kernel: expected a real kernel"):
        tx.update({"kernel": jnp.ones((4, 9), jnp.complex64)}, optax.EmptyState())
