import chex
import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg

from .cases import gaussian


def test_binary_scale_is_the_power_of_two_next_above_the_largest_entry():
    x = jnp.asarray([[0.0, 0.0], [1e-20, -1.5e-20], [3.0, 1.0], [-1e20, 0.0], [jnp.inf, 1.0]], jnp.float32)
    got = np.asarray(linalg.binary_scale(x, -1), np.float64)[:, 0]
    assert got[[0, 2, 4]].tolist() == [1.0, 4.0, 1.0]
    chex.assert_trees_all_equal(np.log2(got) % 1, 0)
    largest = np.abs(np.asarray(x, np.float64)).max(1)[[1, 3]] / got[[1, 3]]
    assert np.all((largest >= 0.5) & (largest < 1))
    # A constant for derivatives, and exact to divide by.
    chex.assert_trees_all_equal(jax.grad(lambda x: jnp.sum(x / linalg.binary_scale(x)))(x[2]), 0.25)


def test_unit_vectors_have_length_one_and_their_derivatives_whatever_their_size():
    size = np.float32([1e-30, 1e-20, 1.0, 1e20, 1e30, 0.0])[:, None]
    x = gaussian(0, 6, 5).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    chex.assert_trees_all_close(linalg.unit_vectors(jnp.asarray(size * x)), np.where(size > 0, unit, 0), rtol=1e-6)
    weights = jnp.asarray(gaussian(1, 6, 5), jnp.float32)
    slope = jax.grad(lambda x: jnp.sum(weights * linalg.unit_vectors(x)))
    want = slope(jnp.asarray(x)) / np.where(size > 0, size, 1)
    chex.assert_trees_all_close(slope(jnp.asarray(size * x)), np.where(size > 0, want, 0), rtol=1e-5)


def test_unit_vectors_show_what_is_not_a_number():
    x = jnp.asarray([[1.0, jnp.nan], [3.0, 4.0]])
    assert jnp.all(jnp.isnan(linalg.unit_vectors(x)[0]))
    chex.assert_trees_all_close(linalg.unit_vectors(x)[1], np.array([0.6, 0.8]), rtol=1e-6)
