"""Energy probes: what ``jax.grad`` delivers for them, on one device and with tokens on many."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels

from .cases import ones


def layer(lead=(), dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((*lead, 8, 3, 12), (*lead, 12, 16), (*lead, 8, 3, 16), (*lead, 12), (*lead, 16))
    x, w, target, *probes = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return x, w, target, [p.astype(jnp.float32) for p in probes]


def loss(x, w, target, probes, gain=None):
    y = product(x, w)
    y = y if gain is None else y * jnp.broadcast_to(gain, y.shape).astype(y.dtype)
    y = kernels.energy_probes(x, y, *probes, gain)
    return jnp.sum(jnp.square(y - target).astype(jnp.float32)) / 2


def product(x, w):
    return jnp.matmul(x, w) if w.ndim == 2 else jax.vmap(product)(x, w)


def gradient(x, w, target, gain=None):
    """In float64, of the weight alone."""
    x, w, target = (np.asarray(z, np.float64) for z in (x, w, target))
    y = np.einsum("...bti,...io->...bto", x, w)
    gain = np.ones(w.shape[-1]) if gain is None else np.asarray(gain, np.float64)
    return np.einsum("...bti,...bto->...io", x, (y * gain - target) * gain)


def assert_energies(got, g, rtol=1e-5):
    chex.assert_trees_all_close(got[0], np.sum(g**2, axis=-1), rtol=rtol)
    chex.assert_trees_all_close(got[1], np.sum(g**2, axis=-2), rtol=rtol)


@pytest.mark.parametrize("lead", [(), pytest.param((2,), marks=pytest.mark.slow)])
def test_gradients_of_probes_are_energies_and_all_others_stay(lead):
    x, w, target, probes = layer(lead)
    value, (dx, dw, got) = jax.value_and_grad(loss, (0, 1, 3))(x, w, target, probes)
    assert_energies(got, gradient(x, w, target))
    plain, (expected_dx, expected_dw) = jax.value_and_grad(
        lambda x, w: jnp.sum(jnp.square(product(x, w) - target)) / 2, (0, 1)
    )(x, w)
    chex.assert_trees_all_close(value, plain, rtol=1e-6)
    chex.assert_trees_all_close(dx, expected_dx, rtol=1e-6)
    chex.assert_trees_all_close(dw, expected_dw, rtol=1e-6)


def test_a_gain_after_the_weight_belongs_to_its_gradient():
    x, w, target, probes = layer()
    gain = jnp.linspace(0.5, 2.0, 16)
    got = jax.grad(loss, 3)(x, w, target, probes, gain)
    assert_energies(got, gradient(x, w, target, gain))


def test_bfloat16_activations_give_float32_energies():
    x, w, target, probes = layer(dtype=jnp.bfloat16)
    got = jax.grad(loss, 3)(x, w, target, probes)
    assert [e.dtype for e in got] == [jnp.float32] * 2
    # dy is rounded to 8 bits; an energy sums 12 or 16 squares.
    assert_energies(got, gradient(x, w, target), rtol=0.03)


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_tokens_on_many_devices_are_summed_before_the_square(cpu_mesh, put, mode):
    x, w, target, probes = layer()
    mesh = cpu_mesh({"data": 4, "tensor": 2}, mode)

    def of_probes(x, y, target, probes):
        def run(probes):
            return jnp.sum(jnp.square(kernels.energy_probes(x, y, *probes) - target)) / 2

        return jax.grad(run)(probes)

    with jax.set_mesh(mesh):
        y = put(product(x, w), mesh, "data", None, "tensor")
        x_, target_ = put(x, mesh, "data", None, None), put(target, mesh, "data", None, "tensor")
        placed = [put(probes[0], mesh, None), put(probes[1], mesh, "tensor")]
        got = jax.jit(of_probes)(x_, y, target_, placed)
    assert_energies(got, gradient(x, w, target))


@pytest.mark.eight_devices
def test_under_a_shard_map_that_checks_types_tokens_are_summed_before_the_square(cpu_mesh):
    x, w, target, probes = layer()
    mesh = cpu_mesh({"data": 8}, AxisType.Auto)

    def of_probes(x, w, target, probes):
        return jax.grad(lambda probes: jax.lax.psum(loss(x, w, target, probes), "data"))(probes)

    run = jax.shard_map(of_probes, mesh=mesh, in_specs=(P("data"), P(), P("data"), P()), out_specs=P())
    assert_energies(jax.jit(run)(x, w, target, probes), gradient(x, w, target))


def test_nothing_is_computed_where_probes_are_not_differentiated():
    x, w, target, probes = layer()
    text = jax.jit(jax.grad(loss, 0)).lower(x, w, target, probes).compile().as_text()
    plain = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(product(x, w) - target)))).lower(x).compile().as_text()
    assert text.count(" dot(") == plain.count(" dot(")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": ones(5)}, ValueError, r"rows: expected the probe \(4,\)"),
        ({"columns": ones(4)}, ValueError, r"columns: expected the probe \(6,\)"),
        ({"y": ones((2, 6))}, ValueError, "y: expected outputs"),
        ({"y": ones((3, 6), jnp.bfloat16)}, TypeError, "y: expected the dtype of x"),
        ({"gain": ones(5)}, ValueError, r"gain: expected \(6,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"x": jnp.ones((3, 4)), "y": jnp.ones((3, 6)), "rows": jnp.zeros(4), "columns": jnp.zeros(6)}
    with pytest.raises(error, match=message):
        kernels.energy_probes(**(good | change))
