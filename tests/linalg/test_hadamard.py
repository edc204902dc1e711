import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg


def test_transform_along_an_axis_equals_the_reference(x64, golden):
    data = golden("intrinsic-dimension/fwht")
    for name, normalized in (("unnormalized", False), ("orthonormal", True)):
        got = linalg.fwht(jnp.asarray(data["x"]), axis=int(data["axis"]), normalized=normalized)
        chex.assert_trees_all_close(got, data[f"y_{name}"], rtol=1e-9, atol=1e-12)


def test_order_is_natural():
    got = linalg.fwht(jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0]))
    chex.assert_trees_all_equal(got, np.array([4, 2, 0, -2, 0, 2, 0, 2]))
    h = np.array([[1, 1], [1, -1]])
    chex.assert_trees_all_equal(linalg.hadamard_matrix(4), np.kron(h, h))
    chex.assert_trees_all_equal(linalg.hadamard_matrix(1), np.ones((1, 1)))


@pytest.mark.parametrize("n", [256, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 2**15))])
def test_transform_is_the_product_with_a_symmetric_matrix_and_its_own_inverse(x64, n):
    x = jnp.asarray(np.random.default_rng(n).standard_normal((2, n)))
    if n <= 256:
        chex.assert_trees_all_close(linalg.fwht(x), x @ linalg.hadamard_matrix(n, x.dtype), rtol=1e-7, atol=1e-10)
    chex.assert_trees_all_close(linalg.fwht(linalg.fwht(x)), n * x, rtol=1e-12, atol=1e-12 * n)
    chex.assert_trees_all_close(linalg.fwht(linalg.fwht(x, normalized=True), normalized=True), x, rtol=1e-7, atol=1e-12)
    value, pull = jax.vjp(linalg.fwht, x)
    chex.assert_trees_all_close(pull(x)[0], value, rtol=1e-12, atol=1e-9)  # sums of up to 2^15 numbers


def test_what_can_not_be_transformed_is_refused():
    with pytest.raises(ValueError, match="x: axis 1: expected a power of two, got 6"):
        linalg.fwht(jnp.ones((4, 6)))
    with pytest.raises(ValueError, match="axis: expected one of the axes of shape"):
        linalg.fwht(jnp.ones(4), axis=1)
    with pytest.raises(ValueError, match="size: expected a power of two, got 0"):
        linalg.hadamard_matrix(0)
    with pytest.raises(TypeError, match="x: expected float32 or float64, got int32"):
        linalg.fwht(jnp.ones(4, jnp.int32))
