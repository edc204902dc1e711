"""The norm of adapted columns: the authors' runs, float64, cancellation, derivatives, shards, memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels
from subspace_jax.kernels import column_energy, norm_chunk_size
from subspace_jax.kernels.dora_weight_norm import xla

from ..variants import rest_slow
from .cases import ones

norm = kernels.dora_weight_norm
CASES = ("c0", "c1", "c2", "c3")


def factors(rows, columns, rank, dtype=jnp.float32, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, columns), (rows, rank), (rank, columns))
    return [jnp.asarray(rng.normal(size=(*lead, *shape)), dtype) for shape in shapes]


def reference(w, a, b, scale):
    w, a, b = (np.asarray(x, np.float64) for x in (w, a, b))
    return np.linalg.norm(w + scale * a @ b, axis=-2)


def plain(w, a, b, scale):
    return jnp.sqrt(jnp.sum(jnp.square(w + scale * jnp.matmul(a, b)), axis=-2))


def stored(g, case):
    return *(jnp.asarray(g[f"{case}_{name}"].T) for name in "WAB"), float(g[f"{case}_s"])


@pytest.mark.parametrize("case", rest_slow(CASES))
def test_follows_the_authors_code_in_float64(x64, golden, case):
    g = golden("dora/norm_f64")
    got = norm(*stored(g, case))
    for name in ("norm", "norm_chunk7", "norm_dense"):
        chex.assert_trees_all_close(got, g[f"{case}_{name}"], rtol=1e-12)


@pytest.mark.parametrize("case", rest_slow(CASES[::-1]))
def test_follows_the_authors_code_in_float32(golden, case):
    g = golden("dora/norm_f32")
    got = norm(*stored(g, case))
    assert got.dtype == jnp.float32
    chex.assert_trees_all_close(got, g[f"{case}_norm"], rtol=1e-5)


def test_bfloat16_is_the_authors_number_once_rounded(golden):
    g = golden("dora/norm_bf16")
    w, a, b = (jnp.asarray(g[f"bf_{name}"].view(ml_dtypes.bfloat16).T) for name in "WAB")
    got = norm(w, a, b, float(g["bf_s"]))
    chex.assert_trees_all_equal(np.asarray(got.astype(jnp.bfloat16)).view(np.uint16), g["bf_norm"])


def test_chunks_are_those_of_the_authors_code(golden):
    for out, rows, rank, budget, itemsize, free, aligned in golden("dora/chunk_rule")["table"].tolist():
        assert norm_chunk_size(out, rows, rank, itemsize, budget << 20, align=1) == free
        assert norm_chunk_size(out, rows, rank, itemsize, budget << 20) == aligned


# The form for TPUs, and the sweep in chunks, give what the default does here.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_form_is_near_float64(dtype):
    w, a, b = factors(70, 33, 5, dtype)
    want = reference(w, a, b, 0.7)
    scale = jnp.float32(0.7)
    for got in (
        norm(w, a, b, 0.7),
        norm(w, a, b, 0.7, energy=column_energy(w)),
        jnp.sqrt(xla.plain_squares(w, a, b, scale)),
        jnp.sqrt(xla._plain_in_parts(w, a, b, scale)),
    ):
        # bfloat16 arguments are taken as they are, and sums are float32.
        chex.assert_trees_all_close(got, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(32,), (1, 7, 64, 70)], ids=str)
def test_chunks_of_rows_change_nothing(x64, monkeypatch, chunks):
    w, a, b = factors(70, 33, 5, jnp.float64)
    for chunk in chunks:
        monkeypatch.setattr(xla, "norm_chunk_size", lambda *_, chunk=chunk: chunk)
        for energy in (None, column_energy(w)):
            got = xla.factored_squares(w, a, b, jnp.float64(0.7), energy, budget=16 << 20)
            chex.assert_trees_all_close(jnp.sqrt(got), reference(w, a, b, 0.7), rtol=1e-12)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 100), st.floats(-4, 4), st.sampled_from([(1, 1, 1), (9, 6, 12), (17, 3, 2)]))
def test_leading_axes_are_single_weights(seed, scale, shape):
    w, a, b = factors(*shape, lead=(2, 3), seed=seed)
    chex.assert_trees_all_close(norm(w, a, b, scale), reference(w, a, b, scale), rtol=2e-5, atol=1e-5)


@pytest.mark.slow
def test_columns_that_cancel_are_computed_as_they_stand():
    w, a, b = factors(64, 40, 4)
    # Half of the columns all but vanish: there a sum of three float32 numbers would be off by ten percent and more.
    noise = 1e-3 * factors(64, 40, 4, seed=1)[0]
    undone = jnp.where(jnp.arange(40)[None] % 2 == 0, noise - 0.5 * a @ b, w)
    got = jax.jit(norm)(undone, a, b, 0.5)
    # W itself is rounded to 6e-8 of entries near 1, against 1e-3 that are left.
    chex.assert_trees_all_close(got, reference(undone, a, b, 0.5), rtol=2e-4)
    chex.assert_trees_all_close(got[1::2], reference(undone, a, b, 0.5)[1::2], rtol=1e-5)


def test_scale_0_gives_the_norm_of_the_weight_and_nan_stays():
    w, a, b = factors(20, 12, 3)
    chex.assert_trees_all_close(norm(w, a, b, 0.0), np.linalg.norm(w, axis=0), rtol=1e-6)
    got = norm(w.at[0, 3].set(jnp.nan), a, b, 1.0)
    chex.assert_trees_all_equal(np.isnan(got), np.arange(12) == 3)


def test_rescaling_the_factors_changes_nothing(x64):
    w, a, b = factors(20, 12, 3, jnp.float64)
    chex.assert_trees_all_close(norm(w, 8 * a, b / 8, 0.3), norm(w, a, b, 0.3), rtol=1e-14)


def test_derivatives_are_those_of_the_plain_formula(x64):
    args = factors(20, 12, 3, jnp.float64, lead=(2,))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12)))
    got, want = (
        jax.grad(lambda w, a, b, f=f: jnp.sum(weights * f(w, a, b, 0.7)), (0, 1, 2))(*args) for f in (norm, plain)
    )
    chex.assert_trees_all_close(tuple(got), tuple(want), rtol=1e-12, atol=1e-13)
    mapped = jax.vmap(jax.grad(lambda w, a, b, c: jnp.sum(c * norm(w, a, b, 0.7)), (0, 1, 2)))(*args, weights)
    chex.assert_trees_all_close(tuple(mapped), tuple(want), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_a_column_of_zeros_has_a_gradient_of_zeros():
    w, a, b = (jnp.zeros_like(x) for x in factors(6, 4, 2))
    for g in jax.grad(lambda *args: jnp.sum(norm(*args, 1.0)), (0, 1, 2))(w, a, b):
        chex.assert_trees_all_equal(g, np.zeros_like(g))


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", rest_slow([AxisType.Explicit, AxisType.Auto]))
@pytest.mark.parametrize(
    "spec", [("fsdp", "tensor"), *(pytest.param(x, marks=pytest.mark.slow) for x in (("fsdp", None), (None, "tensor")))]
)
@pytest.mark.parametrize("cancels", rest_slow([False, True]))
def test_shards_give_what_one_device_does(cpu_mesh, put, mode, spec, cancels):
    w, a, b = factors(32, 16, 4)
    w = w.at[:, 3].set(-0.5 * (a @ b)[:, 3] * (1 + 5e-3)) if cancels else w
    weights = jnp.asarray(np.random.default_rng(1).normal(size=16), jnp.float32)

    def both(w, a, b, weights):
        f = lambda a, b: jnp.sum(weights * norm(w, a, b, 0.5))  # noqa: E731
        return norm(w, a, b, 0.5), jax.grad(f, (0, 1))(a, b)

    want = both(w, a, b, weights)
    mesh = cpu_mesh({"fsdp": 4, "tensor": 2}, mode)
    with jax.set_mesh(mesh):
        placed = (
            put(w, mesh, *spec),
            put(a, mesh, spec[0], None),
            put(b, mesh, None, spec[1]),
            put(weights, mesh, spec[1]),
        )
        got = jax.jit(both)(*placed)
    # Where a column all but vanishes, its direction, and so its gradient, is known to few digits.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if cancels else {"rtol": 1e-5, "atol": 1e-5}
    chex.assert_trees_all_close(got, want, **tolerance)


@pytest.mark.eight_devices
def test_under_shard_map_rows_of_a_shard_are_its_own(cpu_mesh):
    w, a, b = factors(32, 16, 4, lead=(8,))
    mesh = cpu_mesh({"data": 8}, AxisType.Auto)
    run = jax.shard_map(lambda *args: norm(*args, 0.5), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    chex.assert_trees_all_close(jax.jit(run)(w, a, b), reference(w, a, b, 0.5), rtol=1e-5)


def test_rows_split_over_chips_cost_one_sum_of_norms(tpu_mesh):
    mesh = tpu_mesh({"fsdp": 4, "tensor": 4})
    shapes = [((4096, 14336), ("fsdp", "tensor")), ((4096, 16), ("fsdp", None)), ((16, 14336), (None, "tensor"))]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, P(*spec)))
        for shape, spec in shapes
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(lambda *args: norm(*args, 0.5)).lower(*args).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text


@pytest.mark.parametrize(("rows", "columns", "rank"), rest_slow([(4096, 14336, 16), (8192, 8192, 384)]))
def test_tpus_read_the_weight_once_and_hold_nothing_of_its_size(compile_for_tpu, topology, rows, columns, rank):
    shapes = [((rows, columns), jnp.bfloat16), ((rows, rank), jnp.bfloat16), ((rank, columns), jnp.bfloat16)]
    compiled = compile_for_tpu(lambda *args: norm(*args, 0.5), *shapes, topology=topology)
    least = 2 * (rows * columns + rank * (rows + columns))
    assert compiled.cost_analysis()["bytes accessed"] < 1.2 * least
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 20


def test_gpus_read_bfloat16_as_it_is(lower_for_cuda):
    shapes = [((8192, 8192), jnp.bfloat16), ((8192, 384), jnp.bfloat16), ((384, 8192), jnp.bfloat16)]
    text = lower_for_cuda(lambda w, a, b, e: norm(w, a, b, 0.5, energy=e), *shapes, ((8192,), jnp.float32))
    assert any("dot_general" in line and "tensor<8192x8192xbf16>" in line for line in text.splitlines())
    # The adapted weight is there only a few rows at a time, and only where columns cancel.
    assert "tensor<8192x8192xf32>" not in text


def test_memory_is_16_mb_at_8192_squared():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8192, 8192), (8192, 384), (384, 8192), (8192,))]
    lowered = jax.jit(lambda w, a, b, e: norm(w, a, b, 0.5, energy=e)).lower(*shapes)
    memory = lowered.compile().memory_analysis()
    # a^T W takes 12.6 MB; the rest are rows of the fallback and b * a^T W, which are not there at the same time.
    assert memory.temp_size_in_bytes <= 32e6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": ones(4)}, ValueError, r"w: expected weights \[..., in, out\]"),
        ({"w": ones((0, 5))}, ValueError, "without empty axes"),
        ({"w": ones((4, 5), jnp.int32)}, TypeError, "w: expected float32.*int32"),
        ({"a": ones((5, 2))}, ValueError, r"a: expected \(4, 'r'\) .*got \(5, 2\)"),
        ({"a": ones((4, 0))}, ValueError, "a: .*r >= 1"),
        ({"b": ones((3, 5))}, ValueError, r"b: expected \(2, 5\).*got \(3, 5\)"),
        ({"b": ones((2, 5), jnp.float16)}, TypeError, "b: expected float32.*float16"),
        ({"scale": ones(2)}, ValueError, "scale: expected a scalar"),
        ({"energy": ones(4)}, ValueError, r"energy: expected shape \(5,\)"),
        ({"budget_bytes": 15 << 20}, ValueError, "budget_bytes: expected 16777216"),
        ({"budget_bytes": 3e7}, TypeError, "budget_bytes: expected an integer"),
        ({"implementation": "triton"}, ValueError, "implementation: expected one of"),
        ({"implementation": "mosaic_tpu"}, ValueError, "dora_weight_norm here: it has no kernel"),
    ],
)
def test_bad_input_is_named(change, error, message):
    args = {"w": jnp.ones((4, 5)), "a": jnp.ones((4, 2)), "b": jnp.ones((2, 5)), "scale": 0.5} | change
    with pytest.raises(error, match=message):
        functools.partial(norm, **args)()


@pytest.mark.slow
@pytest.mark.parametrize("with_energy", [True, False])
def test_norms_and_gradients_of_any_size_are_those_of_float64(x64, with_energy):
    # Columns of each size side by side, and a column of zeros.
    size = np.array([1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 0.0])
    gaussian = np.random.default_rng(0).standard_normal
    w, a, b = gaussian((6, 8)) * size, gaussian((6, 2)), gaussian((2, 8)) * size
    want = np.linalg.norm(w + 0.5 * a @ b, axis=0)
    narrow = [jnp.asarray(x, jnp.float32) for x in (w, a, b)]
    energy = kernels.column_energy(narrow[0]) if with_energy else None

    def norm(*args):
        return kernels.dora_weight_norm(*args, np.float32(0.5), energy=energy)

    chex.assert_trees_all_close(norm(*narrow), want, rtol=2e-6)
    weights = jnp.asarray(gaussian(8) / np.where(size > 0, size, 1), jnp.float32)
    got = jax.grad(lambda *args: jnp.sum(weights * norm(*args)), (0, 1, 2))(*narrow)
    unit = np.divide(w + 0.5 * a @ b, want, out=np.zeros_like(w), where=want > 0) * np.asarray(weights, np.float64)
    for g, exact in zip(got, (unit, 0.5 * unit @ b.T, 0.5 * a.T @ unit), strict=True):
        assert np.all(np.abs(np.asarray(g, np.float64) - exact) <= 1e-5 * np.abs(exact).max(axis=0))
