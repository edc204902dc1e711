from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subspace_jax import nn


class LowRank(NamedTuple):
    """A structured weight: base plus a low-rank product, never made dense."""

    base: jax.Array
    a: jax.Array
    b: jax.Array

    def linear(self, x):
        return x @ self.base + (x @ self.a) @ self.b


def test_linear_computes_in_the_dtype_of_the_activations():
    y = nn.linear(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4)), jnp.ones((4,)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, 4.0)


@pytest.mark.slow
def test_mlp_runs_with_a_structured_kernel():
    model = nn.MLP(5, (4, 3), rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (2, 5))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    kernel = params["layers"][0]["kernel"]
    a, b = jnp.ones((5, 1)), jnp.full((1, 4), 0.1)
    params["layers"][0]["kernel"] = kernel + a @ b
    dense = nnx.merge(graph, params)(x)
    params["layers"][0]["kernel"] = LowRank(kernel, a, b)
    np.testing.assert_allclose(jax.jit(lambda p: nnx.merge(graph, p)(x))(params), dense, rtol=1e-5, atol=1e-6)


def test_mlp_without_layers_is_the_identity():
    model = nn.MLP(6, (), rngs=nnx.Rngs(params=0))
    assert model.out_features == 6
    np.testing.assert_array_equal(model(jnp.ones((2, 2, 3))), jnp.ones((2, 6)))


def test_mlp_has_a_linear_last_layer():
    model = nn.MLP(4, (8, 8), rngs=nnx.Rngs(params=0))
    assert jnp.min(model(jax.random.normal(jax.random.key(0), (32, 4)))) < 0


@pytest.mark.slow
def test_convnet_halves_the_resolution_at_each_stage():
    model = nn.ConvNet(3, (8, 16), rngs=nnx.Rngs(params=0))
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    assert jax.eval_shape(model.blocks[0], x).shape == (2, 8, 8, 8)
    assert jax.eval_shape(model.blocks[2], jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)).shape == (2, 4, 4, 16)
    assert jax.eval_shape(model, x).shape == (2, 16)


@pytest.mark.slow
def test_convnet_in_bfloat16_is_close_to_float32():
    exact = nn.ConvNet(3, (8,), rngs=nnx.Rngs(params=0))
    rounded = nn.ConvNet(3, (8,), dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(rounded)))
    got = rounded(x)
    assert got.dtype == jnp.bfloat16
    # Three rounded layers on values of order one: a few units of 2^-8.
    np.testing.assert_allclose(got.astype(jnp.float32), exact(x), atol=3e-2)


def test_group_norm_gives_each_group_mean_zero_and_variance_one():
    x = 5.0 + 3.0 * jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
    y = nn.group_norm(x, jnp.ones(6), jnp.zeros(6), groups=2)
    groups = y.reshape(2, 16, 2, 3).transpose(0, 2, 1, 3).reshape(4, -1)
    np.testing.assert_allclose(groups.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(groups.std(1), 1.0, atol=1e-3)


@pytest.mark.parametrize("make", [lambda r: nn.MLP(4, (3, 5), rngs=r), lambda r: nn.ConvNet(3, (8, 8), rngs=r)])
def test_mlp_and_convnet_name_all_axes(make):
    state = nnx.state(make(nnx.Rngs(params=0)), nnx.Param)
    variables = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert variables
    for variable in variables:
        assert len(variable.get_metadata()["axes"]) == variable.get_value().ndim


@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 4, 6), 4), ((2, 6), 2)])
def test_group_norm_rejects_shapes_that_do_not_fit(shape, groups):
    with pytest.raises(ValueError, match="group_norm: expected x"):
        nn.group_norm(jnp.ones(shape), jnp.ones(6), jnp.zeros(6), groups)
