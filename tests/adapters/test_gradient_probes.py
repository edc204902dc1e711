"""Gradient probes of adapters, within a scan over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import adapters, nn

SETTINGS = {"lora": adapters.LoRA((2, 1), (4.0, 1.0)), "dora": adapters.DoRA(2, 3.0)}


def stack_of_layers():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"layers": {"kernel": jax.random.normal(keys[0], (2, 6, 6))}}, jax.random.normal(keys[1], (5, 3, 6))


def loss(params, x):
    def layer(x, kernel):
        return jnp.tanh(nn.linear(x, kernel)), None

    return jnp.sum(jnp.square(jax.lax.scan(layer, x, params["layers"]["kernel"])[0]))


@pytest.mark.parametrize("name", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
def test_gradients_of_probes_are_the_energies_of_the_gradient_of_the_dense_weight(name):
    params, x = stack_of_layers()
    rules = {"layers": SETTINGS[name]}
    trainable = adapters.init(jax.random.key(1), params, rules)
    # Away from the start, where b is zero.
    trainable["layers"]["kernel"]["b"] += 0.3 * jnp.ones_like(trainable["layers"]["kernel"]["a"].mT)
    probed = adapters.add_gradient_probes(trainable)
    got = jax.grad(lambda t: loss(adapters.bind(params, t, rules), x))(probed)["layers"]["kernel"]
    plain = jax.grad(lambda t: loss(adapters.bind(params, t, rules), x))(trainable)["layers"]["kernel"]
    for key, value in plain.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6)

    dense = jax.grad(loss)(adapters.materialize(params, trainable, rules), x)["layers"]["kernel"]
    if name == "dora":
        # The gradient of the factors is at the weight before its columns are scaled.
        dense = dense * adapters.bind(params, trainable, rules)["layers"]["kernel"].gain[:, None, :]
    np.testing.assert_allclose(got["row_energy"], jnp.sum(dense**2, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(got["column_energy"], jnp.sum(dense**2, axis=-2), rtol=1e-4)


def test_add_and_drop_gradient_probes_skip_tables():
    params, _ = stack_of_layers()
    params["embedding"] = jnp.ones((7, 6))
    rules = {"layers": SETTINGS["lora"], "embedding": adapters.LoRA(2, 2.0)}
    trainable = adapters.init(jax.random.key(1), params, rules)
    probed = adapters.add_gradient_probes(trainable)
    assert probed["embedding"].keys() == {"a", "b"}
    assert {k: x.shape for k, x in probed["layers"]["kernel"].items() if "energy" in k} == {
        "row_energy": (2, 6),
        "column_energy": (2, 6),
    }
    assert jax.tree.structure(adapters.drop_gradient_probes(probed)) == jax.tree.structure(trainable)
    assert set(jax.tree.leaves(adapters.label_fn(probed))) == {"factor"}


def test_logical_axes_of_probes_are_those_of_the_sides_of_the_weight():
    params, _ = stack_of_layers()
    rules = {"layers": SETTINGS["dora"]}
    probed = adapters.add_gradient_probes(adapters.init(jax.random.key(1), params, rules))
    _, axes = adapters.logical_axes({"layers": {"kernel": P("layers", "embed", "mlp")}}, probed, rules)
    own = axes["layers"]["kernel"]
    assert (own["row_energy"], own["column_energy"]) == (P("layers", "embed"), P("layers", "mlp"))
