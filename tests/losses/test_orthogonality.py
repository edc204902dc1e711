"""The penalty of lambda-orthogonality: golden vectors of an independent oracle, and what holds of any matrix."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, losses
from subspace_jax.losses.orthogonality import FORMS

NAMES = ("orthogonal", "near", "far", "tall", "wide")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def penalties(w, lam=0.8, kappa=4.0, normalize=False):
    """Residual, and value and gradient of each form."""
    options = {"normalize": normalize}
    found = {form: jax.value_and_grad(losses.lambda_orthogonality)(w, lam, kappa, form, **options) for form in FORMS}
    return losses.orthogonality_residual(w, **options), found


@pytest.mark.parametrize("name", NAMES)
def test_lambda_orthogonality_and_its_gradient_are_golden(name, golden, x64):
    g = golden("lambda-orthogonality/regulariser")
    assert (g["lam"], g["kappa"], g["eps"]) == (0.8, 4.0, 1e-12)
    residual, found = penalties(jnp.asarray(g[f"W_{name}"]))
    # At an orthogonal matrix the gradient is rounding divided by sqrt(eps).
    atol = 1e-6 if name == "orthogonal" else 1e-9
    chex.assert_trees_all_close(residual, g[f"residual_{name}"], atol=1e-9)
    for form, (value, gradient) in found.items():
        chex.assert_trees_all_close(value, g[f"{form}_{name}"], atol=1e-9)
        chex.assert_trees_all_close(gradient, g[f"{form}_grad_{name}"], atol=atol)


def test_lambda_orthogonality_has_the_gradient_of_finite_differences(x64):
    rng = np.random.default_rng(0)
    w, direction = (jnp.asarray(rng.standard_normal((7, 7))) for _ in range(2))
    h = 1e-6
    above, below = (penalties(w + sign * h * direction)[1] for sign in (1, -1))
    for form, (_, gradient) in penalties(w)[1].items():
        slope = (above[form][0] - below[form][0]) / (2 * h)
        assert jnp.sum(gradient * direction) == pytest.approx(float(slope), abs=1e-5)


def test_lambda_orthogonality_is_invariant_to_rotations_of_both_sides(x64):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((7, 7)))
    one, two = (jnp.asarray(np.linalg.qr(rng.standard_normal((7, 7)))[0]) for _ in range(2))
    (residual, before), (turned, after) = penalties(w), penalties(one @ w @ two)
    chex.assert_trees_all_close(turned, residual, atol=1e-6)
    for form, (value, _) in before.items():
        chex.assert_trees_all_close(after[form][0], value, atol=1e-6)


def test_orthogonality_residual_of_a_scaled_identity_is_its_excess(x64):
    for c in (0.5, 1.7):
        w = c * jnp.eye(7)
        assert penalties(w)[0] == pytest.approx(abs(c * c - 1) * 7**0.5, rel=1e-9)
        assert penalties(w, 0.8, 4.0, True)[0] == pytest.approx(abs(c * c - 1), rel=1e-9)


def test_orthogonal_matrices_are_left_alone_in_float32():
    w = linalg.random_orthonormal(jax.random.key(0), 7, 7)
    residual, found = penalties(w, 0.8, 20.0)
    # The Gram matrix of float32 columns is the identity to some 1e-7 an entry.
    assert residual <= 2e-6
    assert found["softplus"][0] == pytest.approx(np.log1p(np.exp(-16)) / 20, rel=1e-3)
    for _, gradient in found.values():
        assert jnp.max(jnp.abs(gradient)) < 1e-5
    value, gradient = penalties(1.05 * w, 0.8, 20.0)[1]["hinge_squared"]  # inside the ball, and not at its centre
    assert value == 0
    assert not jnp.any(gradient)


def test_a_sharp_softplus_is_the_hinge_and_a_zero_threshold_is_soft_orthogonality(x64):
    w = jnp.asarray(np.random.default_rng(2).standard_normal((7, 7)))
    residual, found = penalties(w, 0.8, 1e4)
    assert found["softplus"][0] == pytest.approx(max(0.0, float(residual) - 0.8), abs=1e-4)
    squares = jnp.sum(jnp.square(w.T @ w - jnp.eye(7)))
    assert penalties(w, 0.0, 20.0)[1]["hinge_squared"][0] == pytest.approx(float(squares), rel=1e-9)


def test_gram_and_residual_of_bfloat16_kernels_are_float32():
    w = linalg.random_orthonormal(jax.random.key(0), 7, 7).astype(jnp.bfloat16)
    residual, found = penalties(w, 0.8, 20.0)
    assert residual.dtype == found["softplus"][0].dtype == jnp.float32
    assert found["softplus"][1].dtype == jnp.bfloat16
    # The entries are rounded to 2^-9 of themselves, the subtraction is not.
    assert residual < 7**0.5 * 2**-8


def test_descent_on_the_penalty_alone_ends_at_the_threshold():
    w = jax.random.normal(jax.random.key(3), (7, 7)) / 7**0.5

    def step(w, _):
        return w - 0.01 * jax.grad(losses.lambda_orthogonality)(w, 0.5, 20.0), None

    w = jax.jit(lambda w: jax.lax.scan(step, w, length=1000)[0])(w)
    assert penalties(w, 0.5, 20.0)[0] <= 0.5 + 5 / 20


def test_lambda_orthogonality_tree_sums_over_the_chosen_kernels_of_stacks():
    rng = np.random.default_rng(4)
    stack, bias = jnp.asarray(rng.standard_normal((2, 7, 7)), jnp.float32), jnp.zeros(7)
    one, two = (penalties(w)[1]["softplus"][0] for w in stack)
    params = {"head": {"kernel": stack, "bias": bias}, "body": {"kernel": 3 * stack[0]}}
    got = losses.lambda_orthogonality_tree(params, lambda path, leaf: path == "head/kernel", 0.8, 4.0)
    chex.assert_trees_all_close(got, one + two, rtol=1e-5)
    every = losses.lambda_orthogonality_tree(params, None, 0.8, 4.0)
    chex.assert_trees_all_close(every, one + two + losses.lambda_orthogonality(3 * stack[0], 0.8, 4.0), rtol=1e-5)


@pytest.mark.eight_devices
def test_lambda_orthogonality_of_sharded_columns_is_that_of_one_device():
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.random.normal(jax.random.key(5), (8, 8))
    split = jax.device_put(w, NamedSharding(mesh, P(None, "tensor")))
    chex.assert_trees_all_close(penalties(split), penalties(w), rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (r"w: expected a matrix \[n, m\], got shape \[7\]", (jnp.ones(7), 1.0)),
        ("lam: expected a threshold of at least 0, got -1", (jnp.eye(3), -1.0)),
        ("kappa: expected a sharpness above 0, got 0", (jnp.eye(3), 1.0, 0.0)),
        ("form: expected one of .* got 'hinge'", (jnp.eye(3), 1.0, 20.0, "hinge")),
    ],
)
def test_lambda_orthogonality_refuses_what_can_not_serve(error, arguments):
    with pytest.raises(ValueError, match=error):
        losses.lambda_orthogonality(*arguments)


def test_lambda_orthogonality_tree_and_the_residual_refuse_what_is_no_kernel():
    with pytest.raises(ValueError, match="w: expected a matrix"):
        losses.orthogonality_residual(jnp.ones((2, 3, 3)))
    with pytest.raises(ValueError, match="predicate: expected at least one kernel"):
        losses.lambda_orthogonality_tree({"bias": jnp.ones(3)}, None, 1.0)
    with pytest.raises(ValueError, match=r"chose bias of shape \[3\]"):
        losses.lambda_orthogonality_tree({"bias": jnp.ones(3)}, lambda path, leaf: True, 1.0)
