"""Products with dense kernels: rows as one axis on one CPU, and as they are elsewhere."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn, train

# By its name: the package's attribute is the function.
module = importlib.import_module("subspace_jax.nn.layers.linear")


@pytest.fixture
def one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def gradients(x, kernel, out_dtype):
    def loss(x, kernel):
        return jnp.sum(jnp.sin(nn.linear(x, kernel, out_dtype=out_dtype).astype(jnp.float32)))

    # A new function, for what was traced elsewhere would serve.
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)


@pytest.mark.parametrize(("dtype", "out_dtype"), [("float32", None), ("bfloat16", "float32")])
@pytest.mark.parametrize("rows", [(3, 4), (2, 3, 4), (0, 4)])
def test_rows_as_one_axis_give_the_same_output_and_gradients(one_cpu, monkeypatch, rows, dtype, out_dtype):
    keys = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(keys[0], (*rows, 5), dtype), jax.random.normal(keys[1], (5, 6), dtype)
    output, grads = nn.linear(x, kernel, out_dtype=out_dtype), gradients(x, kernel, out_dtype)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert output.shape == (*rows, 6)
    np.testing.assert_array_equal(output, nn.linear(x, kernel, out_dtype=out_dtype))
    # Sums in another order: of float32 to rounding, of bfloat16 to one unit of the largest.
    eps = {"float32": 1e-6, "bfloat16": 2.0**-7}[dtype]
    for got, expected in zip(grads, gradients(x, kernel, out_dtype), strict=True):
        got, expected = (np.asarray(z, np.float32) for z in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=eps * np.max(np.abs(expected), initial=1))


def test_the_gradient_of_a_kernel_turns_no_activations_on_one_cpu(one_cpu):
    x, kernel = jnp.ones((2, 3, 5)), jnp.ones((5, 6))

    def contracted(x, kernel):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(nn.linear(x, w)), argnums=1))(x, kernel)
        dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return max(len(e.params["dimension_numbers"][0][0]) for e in dots)

    assert contracted(x, kernel) == 1
    assert contracted(x[None], kernel) == 1


def test_rows_stay_as_they_are_where_there_are_several_devices(monkeypatch):
    assert jax.device_count() == 8
    assert not module._on_one_cpu()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert module._on_one_cpu()
    for devices in (1, 8):
        mesh = train.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(train.auto_mesh(mesh)):
            assert module._on_one_cpu() == (devices == 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not module._on_one_cpu()


def test_it_maps_over_leading_axes(one_cpu):
    x, kernels = jnp.ones((4, 2, 3, 5)), jnp.arange(120.0).reshape(4, 5, 6)
    mapped = jax.vmap(nn.linear)(x, kernels)
    np.testing.assert_allclose(mapped, jnp.einsum("zabi,zio->zabo", x, kernels), rtol=1e-6)
