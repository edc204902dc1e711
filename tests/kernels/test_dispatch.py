"""Which implementation runs, and what becomes of shards: on a toy op with a reference and a kernel."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from subspace_jax.kernels._dispatch import check_implementation, choose
from subspace_jax.kernels._shards import over_shards, result, vary_alike

HIGHEST = jax.lax.Precision.HIGHEST


def _reference(x, c):
    return jnp.sum(jnp.square(jnp.dot(x, c, precision=HIGHEST)), axis=-1)


def _kernel(x, c, interpret):
    def body(x, c, out):
        z = jnp.dot(x[...], c[...], precision=HIGHEST)
        out[...] = jnp.sum(jnp.square(z), axis=-1, keepdims=True)

    rows, n = x.shape
    call = pl.pallas_call(
        body,
        grid=(pl.cdiv(rows, 8),),
        in_specs=[pl.BlockSpec((8, n), lambda i: (i, 0)), pl.BlockSpec(c.shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 1), lambda i: (i, 0)),
        out_shape=result((rows, 1), jnp.float32, x, c),
        interpret=interpret,
    )
    return call(x, c)[:, 0]


@functools.partial(jax.jit, static_argnames="implementation")
def energy(x, c, implementation=None):
    """Rows' energy in a subspace: a sum over ``p``, so that ``p`` may be split, but ``n`` may not."""
    x, c = vary_alike(x, c)
    run = functools.partial(choose, implementation, _reference, _kernel)
    return over_shards(run, "b n, n p -> b", gathered=("n",))(x, c)


IMPLEMENTATIONS = (None, "xla", "mosaic_tpu_interpret")


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (16, 24))


@pytest.fixture(scope="module")
def c():
    return jax.random.normal(jax.random.key(1), (24, 6))


def _same(got, x, c):
    assert jnp.max(jnp.abs(got - _reference(x, c))) <= 1e-4  # sums of 6 squares of about 24, rounded in another order


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_gives_the_same_under_vmap_of_vmap(x, c, implementation):
    op = functools.partial(energy, implementation=implementation)
    _same(op(x, c), x, c)
    _same(jax.vmap(jax.vmap(op, (0, None)), (0, None))(x.reshape(2, 2, 4, 24), c).reshape(16), x, c)


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "spec",
    [("data", None), *(pytest.param(x, marks=pytest.mark.slow) for x in ((None, "data"), (("data", "tensor"), None)))],
)
def test_shards_give_what_whole_arrays_give(x, c, implementation, axis_type, spec, cpu_mesh, put):
    mesh = cpu_mesh({"data": 4, "tensor": 2}, axis_type)
    op = jax.jit(functools.partial(energy, implementation=implementation))
    with jax.set_mesh(mesh):
        got = op(put(x, mesh, *spec), put(c, mesh, None, "tensor"))
    _same(jax.device_get(got), x, c)


@pytest.mark.eight_devices
def test_rows_split_over_an_explicit_axis_stay_split(x, c, cpu_mesh, put):
    mesh = cpu_mesh({"data": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        got = jax.jit(energy)(put(x, mesh, "data", None), put(c, mesh, None, "tensor"))
    assert got.sharding.spec == PartitionSpec("data")


@pytest.mark.eight_devices
@pytest.mark.parametrize("spec", [("data", None, None), (None, "data", None)])
def test_vmap_over_an_explicit_axis(x, c, spec, cpu_mesh, put):
    mesh = cpu_mesh({"data": 4, "tensor": 2})
    op = jax.jit(jax.vmap(functools.partial(energy, implementation="mosaic_tpu_interpret"), (0, None)))
    with jax.set_mesh(mesh):
        got = op(put(x.reshape(4, 4, 24), mesh, *spec), put(c, mesh, None, "tensor"))
    assert got.sharding.spec == PartitionSpec(*spec[:2])
    _same(jax.device_get(got).reshape(16), x, c)


@pytest.mark.eight_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_within_shard_map_the_op_takes_shards_as_they_are(x, c, check_vma, cpu_mesh):
    mesh = cpu_mesh({"data": 4, "tensor": 2}, AxisType.Auto)
    specs = (PartitionSpec("data", None), PartitionSpec())
    op = jax.shard_map(energy, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=check_vma)
    _same(jax.jit(op)(x, c), x, c)


def _text(mesh, x_spec, c_spec):
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((64, 256), x_spec), ((256, 128), c_spec))
    ]
    return jax.jit(energy).lower(*shapes).compile().as_text()


def test_one_chip_runs_the_kernel(compile_for_tpu, topology):
    shapes = ((64, 256), jnp.float32), ((256, 128), jnp.float32)
    assert "tpu_custom_call" in compile_for_tpu(energy, *shapes, topology=topology).as_text()


def test_a_program_that_the_compiler_must_split_runs_the_reference(tpu_mesh):
    mesh = tpu_mesh({"data": 8, "tensor": 2}, AxisType.Auto)
    text = _text(mesh, PartitionSpec("data"), PartitionSpec(None, "tensor"))
    assert "tpu_custom_call" not in text
    assert "all-gather" not in text


def test_explicit_shards_run_the_kernel_and_one_sum_over_the_split_axis(tpu_mesh):
    mesh = tpu_mesh({"data": 8, "tensor": 2})
    with jax.set_mesh(mesh):
        text = _text(mesh, PartitionSpec("data"), PartitionSpec(None, "tensor"))
    assert "tpu_custom_call" in text
    assert text.count(" all-reduce(") == 1


def test_a_gpu_runs_the_reference(lower_for_cuda):
    shapes = ((64, 256), jnp.float32), ((256, 128), jnp.float32)
    assert "custom_call" not in lower_for_cuda(energy, *shapes)


def test_unknown_implementation_is_refused(x):
    with pytest.raises(ValueError, match=r"implementation: expected one of .* for energy, got 'triton'"):
        check_implementation("energy", "triton")


def test_a_kernel_that_cannot_serve_says_why(x):
    with pytest.raises(ValueError, match="can't serve energy here: it takes no float64"):
        check_implementation("energy", "mosaic_tpu", "it takes no float64")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_choose_refuses_a_forced_kernel_when_it_lowers_for_another_platform(x, c, wrap):
    op = wrap(functools.partial(choose, "mosaic_tpu", _reference, _kernel))
    with pytest.raises(ValueError, match="'mosaic_tpu' runs on TPUs, this program is for cpu"):
        op(x, c)


def test_a_kernel_that_disagrees_with_the_reference_on_shapes_is_found_when_traced(x, c):
    with pytest.raises(TypeError, match="the kernel returns"):
        choose(None, lambda x, c: _reference(x, c)[None], _kernel, x, c)
