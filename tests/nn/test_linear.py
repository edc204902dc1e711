import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn


@pytest.mark.parametrize("rows", [(), (3,), (2, 3, 4), (0, 4)])
def test_linear_multiplies_over_the_last_axis(rows):
    draw = np.random.default_rng(0).normal
    x, kernel, bias = (draw(size=shape).astype(np.float32) for shape in ((*rows, 5), (5, 6), (6,)))
    actual = nn.linear(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias))
    chex.assert_trees_all_close(actual, x @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_linear_accumulates_in_out_dtype():
    x, kernel = jnp.ones((2, 512), jnp.bfloat16), jnp.full((512, 3), 1 + 2.0**-7)
    assert nn.linear(x, kernel).dtype == jnp.bfloat16
    chex.assert_trees_all_equal(nn.linear(x, kernel, out_dtype=jnp.float32), jnp.full((2, 3), 516.0))


def test_linear_maps_over_leading_axes_of_x_and_kernel():
    x, kernels = jnp.ones((4, 2, 3, 5)), jnp.arange(120.0).reshape(4, 5, 6)
    mapped = jax.vmap(nn.linear)(x, kernels)
    chex.assert_trees_all_close(mapped, jnp.einsum("zabi,zio->zabo", x, kernels), rtol=1e-6)


def test_linear_refuses_integers_and_other_widths():
    with pytest.raises(TypeError, match="floating-point x"):
        nn.linear(jnp.ones((2, 5), jnp.int32), jnp.ones((5, 6)))
    with pytest.raises(ValueError, match="has 4 features"):
        nn.linear(jnp.ones((2, 4)), jnp.ones((5, 6)))
