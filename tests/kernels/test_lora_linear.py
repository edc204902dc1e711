"""A linear layer with a low-rank update: float64, derivatives, shards, and one product on TPUs."""

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
from subspace_jax.kernels.lora_linear import xla

from ..variants import rest_slow
from .cases import ones

layer = kernels.lora_linear


def inputs(tokens=(3, 5), rows=14, columns=10, rank=3, dtype=jnp.float32, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((*tokens, rows), (rows, columns), (rows, rank), (rank, columns))
    return [jnp.asarray(rng.normal(size=(*lead, *shape)), dtype) for shape in shapes]


def plain(x, w, a, b, scale):
    return x @ w + scale * (x @ a) @ b


def in_float64(*args, scale):
    return plain(*(np.asarray(x, np.float64) for x in args), scale)


@pytest.mark.parametrize(
    "sizes", [pytest.param(x, marks=pytest.mark.slow) for x in ((1, 1, 1), (17, 3, 5))] + [(9, 130, 8)]
)
@pytest.mark.parametrize("tokens", [(2, 3), *(pytest.param(x, marks=pytest.mark.slow) for x in ((), (7,)))])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_float32_is_near_float64(seed, sizes, tokens):
    args = inputs(tokens, *sizes, seed=seed)
    want = in_float64(*args, scale=0.7)
    # Sums of up to 130 products of normal numbers.
    for got in (layer(*args, 0.7), xla.joined(*args, jnp.float32(0.7))):
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_rounded_where_the_update_and_the_result_are():
    args = inputs((64,), 96, 80, 8, jnp.bfloat16)
    want = in_float64(*args, scale=0.5)
    for got in (layer(*args, 0.5), xla.joined(*args, jnp.float32(0.5))):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 2.0**-8 * np.linalg.norm(want)


def test_factors_of_another_type_are_rounded_on_the_way_in_and_keep_their_type_in_gradients():
    x, w, a, b = inputs()
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    assert layer(x, w, a, b, 0.5).dtype == jnp.bfloat16
    grads = jax.grad(lambda a, b: jnp.sum(layer(x, w, a, b, 0.5).astype(jnp.float32)), (0, 1))(a, b)
    assert [g.dtype for g in grads] == [jnp.float32] * 2


def test_every_gradient_is_that_of_the_plain_formula(x64):
    args = inputs(dtype=jnp.float64)

    def gradients(f):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args, 0.7))), range(4))(*args)

    want = gradients(plain)
    for got in (gradients(layer), gradients(jax.jit(layer)), gradients(jax.checkpoint(layer))):
        chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)
    d = jnp.cos(plain(*args, 0.7))
    back = xla.joined_back(d, *args[1:], jnp.float64(0.7))
    chex.assert_trees_all_close(back, want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_stacked_weights_are_single_ones(x64):
    stacked = inputs((5,), lead=(2, 3), dtype=jnp.float64)
    got = layer(*stacked, 0.7)
    chex.assert_trees_all_close(got, plain(*stacked, 0.7), rtol=1e-12, atol=1e-12)
    grads = jax.grad(lambda *args: jnp.sum(jnp.sin(layer(*args, 0.7))), range(4))(*stacked)
    want = jax.grad(lambda *args: jnp.sum(jnp.sin(plain(*args, 0.7))), range(4))(*stacked)
    chex.assert_trees_all_close(grads, want, rtol=1e-12, atol=1e-12)
    mapped = jax.vmap(jax.vmap(lambda *args: layer(*args, 0.7)))(*stacked)
    chex.assert_trees_all_close(mapped, got, rtol=1e-12)


SPECS = {
    "columns": (("data", None), (None, "tensor"), (None, None), (None, "tensor")),
    "rows": (("data", "tensor"), ("tensor", None), ("tensor", None), (None, None)),
    "fully sharded": (("data", None), ("data", "tensor"), ("data", None), (None, "tensor")),
}


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", rest_slow(["fully sharded", "columns", "rows"]))
def test_shards_give_what_one_device_does(cpu_mesh, put, mode, layout):
    args = inputs((8,), 16, 12, 4)

    def both(*args):
        loss = lambda *args: jnp.sum(jnp.sin(layer(*args, 0.5)))  # noqa: E731
        return layer(*args, 0.5), jax.grad(loss, range(4))(*args)

    want = both(*args)
    mesh = cpu_mesh({"data": 4, "tensor": 2}, mode)
    with jax.set_mesh(mesh):
        got = jax.jit(both)(*(put(x, mesh, *spec) for x, spec in zip(args, SPECS[layout], strict=True)))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.eight_devices
def test_under_shard_map_gradients_of_shared_factors_are_summed(cpu_mesh):
    x, w, a, b = inputs((8,), 16, 12, 4)
    mesh = cpu_mesh({"data": 8}, AxisType.Auto)

    def loss(a, b, x):
        run = jax.shard_map(
            lambda x, a, b: layer(x, w, a, b, 0.5), mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data")
        )
        return jnp.sum(jnp.sin(run(x, a, b)))

    got = jax.jit(jax.grad(loss, (0, 1)))(a, b, x)
    want = jax.grad(lambda a, b: jnp.sum(jnp.sin(plain(x, w, a, b, 0.5))), (0, 1))(a, b)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def shapes(t, rows, columns, rank, dtype=jnp.bfloat16):
    return [((t, rows), dtype), ((rows, columns), dtype), ((rows, rank), dtype), ((rank, columns), dtype)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8192, 4096, 14336, 8), (8192, 8192, 8192, 384)], ids=str)
def test_tpus_make_one_product_and_write_the_result_once(compile_for_tpu, topology, sizes):
    compiled = compile_for_tpu(lambda *args: layer(*args, 0.5), *shapes(*sizes), topology=topology)
    # x a, and what the compiler keeps of small operands; a second pass would hold another result, 134 MB and more.
    assert compiled.memory_analysis().temp_size_in_bytes < 10e6
    apart = compile_for_tpu(lambda *args: xla.apart(*args, jnp.float32(0.5)), *shapes(*sizes), topology=topology)
    assert compiled.cost_analysis()["bytes accessed"] < 0.8 * apart.cost_analysis()["bytes accessed"]


@pytest.mark.slow
def test_the_gradient_of_a_frozen_weight_is_not_made(compile_for_tpu, topology):
    sizes = (4096, 4096, 14336, 16)

    def loss(x, w, a, b):
        return jnp.sum(jnp.square(layer(x, w, a, b, 0.5).astype(jnp.float32)))

    compiled = compile_for_tpu(jax.grad(loss, (0, 2, 3)), *shapes(*sizes), topology=topology)
    # Forwards and dx; dw would be a third of this size.
    assert compiled.cost_analysis()["flops"] < 2.2 * 2 * 4096 * 4096 * 14336
    # The result and nothing of the weight's size: no copy, no transpose.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2 * 4096 * 14336


@pytest.mark.slow
def test_sharded_by_columns_and_tokens_there_is_no_collective(tpu_mesh):
    mesh = tpu_mesh({"data": 4, "tensor": 4})
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
        for (shape, dtype), spec in zip(shapes(8192, 4096, 14336, 16), SPECS["columns"], strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(lambda *args: layer(*args, 0.5)).lower(*args).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_gpus_take_two_products(lower_for_cuda):
    text = lower_for_cuda(lambda *args: layer(*args, 0.5), *shapes(8192, 8192, 28672, 64))
    assert "concatenate" not in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ones((3, 13))}, ValueError, r"x: expected \[..., 14\] for w \(14, 10\), got shape \(3, 13\)"),
        ({"x": ones((3, 14), jnp.int32)}, TypeError, "x: expected float32.*int32"),
        ({"w": ones(14)}, ValueError, "w: expected"),
        ({"w": ones((14, 0))}, ValueError, "w: .*empty"),
        ({"a": ones((14, 0))}, ValueError, "a: .*r >= 1"),
        ({"a": ones((13, 3))}, ValueError, r"a: expected \(14, 'r'\)"),
        ({"b": ones((2, 10))}, ValueError, r"b: expected \(3, 10\)"),
        ({"scale": ones(3)}, ValueError, "scale: expected a scalar"),
        ({"implementation": "cuda"}, ValueError, "implementation: expected one of"),
        ({"implementation": "mosaic_tpu"}, ValueError, "lora_linear here: it has no kernel"),
    ],
)
def test_bad_input_is_named(change, error, message):
    args = dict(zip("xwab", inputs(), strict=True)) | {"scale": 0.5} | change
    with pytest.raises(error, match=message):
        layer(**args)
