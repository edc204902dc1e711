"""Energies of a weight's gradient: float64, sums over devices before the square, and no gradient in memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels
from subspace_jax.kernels.weight_grad_energy import xla

from ..variants import rest_slow
from .cases import ones

energy = kernels.weight_grad_energy


def inputs(tokens=24, rows=16, columns=12, dtype=jnp.float32, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(*lead, tokens, n)), dtype) for n in (rows, columns)]


def reference(x, dy):
    g = np.asarray(x, np.float64).mT @ np.asarray(dy, np.float64)
    return np.sum(g**2, axis=-1), np.sum(g**2, axis=-2)


def assert_near(got, want, rtol=1e-5):
    chex.assert_trees_all_close(tuple(got), tuple(want), rtol=rtol)


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((7, 48, 9), 5),
        *rest_slow(
            [((33, 70, 50), None), *((s, b) for s in ((1, 1, 1), (33, 70, 50), (5, 31, 2)) for b in (1, 5, 64))]
        ),
    ],
)
@pytest.mark.parametrize("dtype", rest_slow([jnp.bfloat16, jnp.float32]))
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_every_block_gives_the_energies_of_the_gradient(seed, sizes, block, dtype):
    x, dy = inputs(*sizes, dtype, seed=seed)
    # bfloat16 is taken as it is, with float32 sums; an entry of G may cancel, energies don't.
    assert_near(energy(x, dy, block=block), reference(x, dy), 1e-4)


def test_float64_stays_float64_and_both_forms_agree(x64):
    x, dy = inputs(dtype=jnp.float64)
    assert_near(energy(x, dy), reference(x, dy), 1e-13)
    assert_near(xla.at_once(x, dy), reference(x, dy), 1e-13)


def test_both_energies_add_up_to_the_same():
    rows, columns = energy(*inputs(33, 70, 50))
    chex.assert_trees_all_close(jnp.sum(rows), jnp.sum(columns), rtol=1e-5)


def test_leading_axes_are_weights_of_their_own():
    x, dy = inputs(lead=(2, 3))
    assert_near(energy(x, dy), reference(x, dy))
    assert_near(jax.vmap(jax.vmap(energy))(x, dy), reference(x, dy))


def test_results_are_constants_for_derivatives():
    x, dy = inputs()
    chex.assert_trees_all_equal(jax.grad(lambda x: jnp.sum(energy(x, dy)[0]))(x), np.zeros_like(x))


SPECS = {
    "tokens": (("data", None), ("data", None)),
    "columns": (("data", None), ("data", "tensor")),
    "rows": (("data", "tensor"), ("data", None)),
}


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", rest_slow(["columns", "tokens", "rows"]))
def test_tokens_on_many_devices_are_summed_before_the_square(cpu_mesh, put, mode, layout):
    args = inputs(lead=(2,))
    mesh = cpu_mesh({"data": 4, "tensor": 2}, mode)
    with jax.set_mesh(mesh):
        placed = (put(x, mesh, None, *spec) for x, spec in zip(args, SPECS[layout], strict=True))
        assert_near(jax.jit(energy)(*placed), reference(*args))


@pytest.mark.eight_devices
@pytest.mark.parametrize("checked", rest_slow([True, False]))
def test_under_shard_map_named_axes_are_summed(cpu_mesh, checked):
    args = inputs()
    mesh = cpu_mesh({"data": 8}, AxisType.Auto)
    run = jax.shard_map(
        lambda x, dy: energy(x, dy, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
        check_vma=checked,
    )
    assert_near(jax.jit(run)(*args), reference(*args))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8192, 4096, 14336), (8192, 14336, 4096)], ids=str)
def test_tpus_hold_no_gradient(compile_for_tpu, topology, sizes):
    t, rows, columns = sizes
    shapes = [((t, rows), jnp.bfloat16), ((t, columns), jnp.bfloat16)]
    memory = compile_for_tpu(energy, *shapes, topology=topology).memory_analysis()
    assert memory.temp_size_in_bytes < 1e6


@pytest.mark.slow
def test_tokens_split_over_chips_cost_the_sum_of_the_gradient_a_part_at_a_time(tpu_mesh):
    mesh = tpu_mesh({"data": 4, "tensor": 4})
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
        for shape, spec in zip([(8192, 4096), (8192, 14336)], SPECS["columns"], strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(energy).lower(*args).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    # One in the loop for parts of G, one for the rows' energies over "tensor".
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 2
    # A chip's share of G would be 59 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 45e6


def test_elsewhere_16_mib_of_the_gradient_are_there_at_a_time():
    shapes = [jax.ShapeDtypeStruct((512, n), jnp.float32) for n in (4096, 8192)]
    memory = jax.jit(energy).lower(*shapes).compile().memory_analysis()
    # A part of G and of x; all of G would be 134 MB.
    assert memory.temp_size_in_bytes < 45e6


def test_gpus_hold_parts_of_the_gradient(lower_for_cuda):
    text = lower_for_cuda(energy, ((8192, 8192), jnp.bfloat16), ((8192, 28672), jnp.bfloat16))
    assert "tensor<8192x28672xf32>" not in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ones(4)}, ValueError, r"x: expected \[..., tokens, in\]"),
        ({"x": ones((0, 4))}, ValueError, "x: .*empty"),
        ({"dy": ones((4, 5))}, ValueError, r"dy: expected \[3, out\] for x \(3, 4\), got shape \(4, 5\)"),
        ({"dy": ones((3, 0))}, ValueError, "dy: expected"),
        ({"x": ones((3, 4), jnp.int32)}, TypeError, "x: expected float32.*int32"),
        ({"dy": ones((3, 5), jnp.bfloat16)}, TypeError, "dy: expected the dtype of x, float32, got bfloat16"),
        ({"block": 0}, ValueError, "block: expected a positive number of rows"),
        ({"implementation": "mosaic_tpu"}, ValueError, "weight_grad_energy here: it has no kernel"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        energy(**({"x": jnp.ones((3, 4)), "dy": jnp.ones((3, 5))} | change))
