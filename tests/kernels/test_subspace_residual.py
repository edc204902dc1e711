"""Residuals off a subspace: SubspaceAD's scores, float64, derivatives, shards, memory, programs for other machines."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from subspace_jax.kernels.subspace_residual import complement_basis, subspace_residual

from ..variants import rest_slow
from .cases import ones

FORMS = ("basis", "complement")


def _reference(x, mean, basis, complement=False):
    """The formula in float64."""
    x, mean, basis = (np.asarray(y, np.float64) for y in (x, mean, basis))
    z = (x - mean) @ basis
    return np.sum((z if complement else x - mean - z @ basis.T) ** 2, axis=-1)


def _plain(x, mean, basis, complement):
    rows = x - jnp.broadcast_to(mean, x.shape)
    z = rows @ basis
    return jnp.sum(jnp.square(z if complement else rows - z @ basis.T), axis=-1)


def _inputs(rows, d, p, dtype=jnp.float32, seed=0, share=0.1):
    """Rows far from zero whose residual has about ``share`` of their length, as features have."""
    rng = np.random.default_rng(seed)
    full = np.linalg.qr(rng.normal(size=(d, d)))[0]
    sizes = np.where(np.arange(d) < p, 1.0, share)
    mean = rng.normal(size=d)
    x = rng.normal(size=(*rows, d)) * sizes @ full.T + mean
    return jnp.asarray(x, dtype), jnp.asarray(mean, jnp.float32), jnp.asarray(full[:, :p], jnp.float32)


def _score(x, mean, basis, form="basis", **options):
    columns = {form: basis if form == "basis" else complement_basis(basis)}
    return subspace_residual(x, mean, **columns, **options)


def _error(got, x, mean, basis):
    wanted = _reference(x, mean, basis)
    return float(np.max(np.abs(np.asarray(got, np.float64) / wanted - 1)))


@pytest.mark.parametrize("tag", rest_slow(["kfix", "ev"]))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("drop", rest_slow([2, 0]))
def test_scores_of_the_authors_code_are_reproduced(tag, form, drop, golden, x64):
    del x64
    data = golden("subspacead/pca_scores")
    if drop:
        # Leading directions that count as residual: a smaller subspace, by its directions of largest variance.
        features = np.asarray(data["features"], np.float64)
        _, vectors = np.linalg.eigh(np.cov(features.T))
        basis = vectors[:, ::-1][:, drop : int(data[f"{tag}_k"])]
    else:
        _, vectors = np.linalg.eigh(data[f"{tag}_projector"])
        basis = vectors[:, -int(data[f"{tag}_k"]) :]
    x, mean, basis = (jnp.asarray(y) for y in (data["queries"], data[f"{tag}_mu"], basis))
    wanted = data[f"{tag}_reconstruction_drop{drop}_f64"]
    chex.assert_trees_all_close(_score(x.astype(float), mean, basis, form), wanted, rtol=1e-9)
    single = _score(x, mean.astype(jnp.float32), basis.astype(jnp.float32), form)
    assert single.dtype == jnp.float32
    chex.assert_trees_all_close(single, data[f"{tag}_reconstruction_drop{drop}"], rtol=2e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", rest_slow([70, 3, 40]))
@pytest.mark.parametrize("block", rest_slow([48, None]))
def test_float32_scores_are_those_of_float64(form, p, block):
    x, mean, basis = _inputs((150,), 80, p)
    # The residual has a tenth of the rows' length or less, so that roundings of rows count tenfold, and twice in
    # squares; mean and rows are the same float32 numbers in both.
    assert _error(_score(x, mean, basis, form, block=block), x, mean, basis) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", rest_slow([3, 70]))
def test_bfloat16_rows_keep_the_digits_of_a_float32_basis(form, p):
    x, mean, basis = _inputs((150,), 80, p, jnp.bfloat16)
    assert _error(_score(x, mean, basis, form), x, mean, basis) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", rest_slow([3, 70]))
def test_a_bfloat16_basis_leaks_what_it_rounds(form, p):
    x, mean, basis = _inputs((150,), 80, p, jnp.bfloat16)
    columns = basis if form == "basis" else complement_basis(basis)
    got = subspace_residual(x, mean, **{form: columns.astype(jnp.bfloat16)})
    assert got.dtype == jnp.float32
    # The residual's length is wrong by at most 2^-7 of the rows': coordinates, columns and products are rounded, each
    # by 2^-9 of the rows' length at most.
    length = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(mean, np.float64), axis=-1)
    assert np.max(np.abs(np.sqrt(got) - np.sqrt(_reference(x, mean, basis))) / length) <= 2.0**-7


@pytest.mark.slow
def test_forms_agree_and_energies_add_up(x64):
    del x64
    x, mean, basis = (y.astype(float) for y in _inputs((30,), 12, 5))
    basis = jnp.asarray(np.linalg.qr(basis)[0])
    direct, complement = _score(x, mean, basis), _score(x, mean, basis, "complement")
    chex.assert_trees_all_close(direct, complement, rtol=1e-12)
    centered = np.asarray(x) - np.asarray(mean)
    energy = np.sum(centered**2, -1) - np.sum((centered @ np.asarray(basis)) ** 2, -1)
    chex.assert_trees_all_close(direct, energy, rtol=1e-11)
    rotated = jnp.asarray(np.asarray(basis) @ np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0])
    chex.assert_trees_all_close(direct, _score(x, mean, rotated), rtol=1e-12)


def test_the_whole_space_leaves_only_rounding(x64):
    del x64
    x, mean, basis = (y.astype(float) for y in _inputs((30,), 12, 12))
    basis = jnp.linalg.qr(basis)[0]
    assert jnp.max(subspace_residual(x, mean, basis) / jnp.sum(jnp.square(x - mean[None]), -1)) <= 1e-28


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_complement_basis_completes_an_orthonormal_basis(dtype):
    basis = _inputs((1,), 200, 77)[2].astype(dtype)
    rest = complement_basis(jnp.stack([basis, basis]))[1]
    assert rest.shape == (200, 123)
    both = jnp.concatenate([basis.astype(jnp.float32), rest], axis=1).astype(jnp.float32)
    error = jnp.abs(both.T @ both - jnp.eye(200))
    assert jnp.max(error[77:, 77:]) <= 2e-6
    assert jnp.max(error[:77, 77:]) <= (2e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize(
    ("rows", "d", "p", "block"),
    rest_slow([(37, 20, 5, 8), (1, 1, 1, 1), (70, 20, 15, 80), (64, 7, 2, 3), (33, 13, 13, 32), (5, 12, 4, 1)]),
)
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_any_number_of_rows_goes_in_any_strips(rows, d, p, block, seed):
    x, mean, basis = _inputs((rows,), d, p, seed=seed)
    got = subspace_residual(x, mean, basis, block=block)
    scale = np.sum((np.asarray(x, np.float64) - np.asarray(mean, np.float64)) ** 2, -1)
    assert np.max(np.abs(got - _reference(x, mean, basis)) / scale) <= 1e-5


@pytest.mark.parametrize("leading", [(2, 3, 4), *(pytest.param(x, marks=pytest.mark.slow) for x in ((), (3,)))])
@pytest.mark.parametrize("form", rest_slow(FORMS))
def test_leading_axes_are_rows(leading, form):
    x, mean, basis = _inputs(leading, 20, 5)
    got = _score(x, mean, basis, form)
    assert got.shape == leading
    assert _error(got, x, mean, basis) <= 1e-5


# --------------------------------------------------------------------------------------------- derivatives


def _gradients(f, *args):
    return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))(*args)


def _op(x, mean, columns, complement, block=None):
    return subspace_residual(x, mean, **{"complement" if complement else "basis": columns}, block=block)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("p", rest_slow([3, 9]))
@pytest.mark.parametrize("block", rest_slow([16, None]))
def test_gradients_are_those_of_the_plain_formula(complement, p, block, x64):
    """For columns that aren't orthonormal too."""
    del x64
    keys = jax.random.split(jax.random.key(0), 3)
    x, mean = jax.random.normal(keys[0], (6, 7, 11), float), jax.random.normal(keys[1], (11,), float)
    columns = jax.random.normal(keys[2], (11, p), float) / 4
    got = _gradients(functools.partial(_op, complement=complement, block=block), x, mean, columns)
    wanted = _gradients(functools.partial(_plain, complement=complement), x, mean, columns)
    for a, b in zip(got, wanted, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-12, atol=1e-12 * float(jnp.max(jnp.abs(b))))


@pytest.mark.slow
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 2e-2), (jnp.float32, 1e-5)])
def test_gradients_keep_dtypes_and_digits(complement, dtype, bound):
    x, mean, basis = _inputs((40,), 24, 7, dtype, share=1.0)
    columns = basis.astype(dtype)
    got = jax.grad(lambda *args: jnp.sum(_op(*args, complement)), (0, 1, 2))(x, mean, columns)
    assert [y.dtype for y in got] == [dtype, jnp.float32, dtype]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(y, np.float64)) for y in (x, mean, columns)]
        wanted = jax.grad(lambda *args: jnp.sum(_plain(*args, complement)), (0, 1, 2))(*wide)
        wanted = [np.asarray(y) for y in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert np.max(np.abs(np.asarray(a, np.float64) - b)) <= bound * np.max(np.abs(b))


@pytest.mark.slow
@pytest.mark.parametrize("complement", [False, True])
def test_op_composes_with_jit_vmap_grad_and_scan(complement):
    x, mean, basis = _inputs((4, 12), 10, 3)
    bases = jnp.stack([basis] * 4)
    wanted = jax.vmap(functools.partial(_plain, complement=complement), (0, None, 0))(x, mean, bases)
    op = functools.partial(_op, complement=complement, block=5)
    chex.assert_trees_all_close(jax.jit(jax.vmap(op, (0, None, 0)))(x, mean, bases), wanted, rtol=1e-4)
    _, scanned = jax.lax.scan(lambda c, x: (c, op(x, mean, basis)), None, x)
    chex.assert_trees_all_close(scanned, wanted, rtol=1e-4)

    def total(f):
        return lambda x, mean, bases: jnp.sum(jax.vmap(f, (0, None, 0))(x, mean, bases))

    got = jax.jit(jax.grad(total(op), (0, 1, 2)))(x, mean, bases)
    wanted = jax.jit(jax.grad(total(functools.partial(_plain, complement=complement)), (0, 1, 2)))(x, mean, bases)
    each = jax.jit(jax.vmap(jax.grad(lambda *args: jnp.sum(op(*args)), (0, 1, 2)), (0, None, 0)))(x, mean, bases)
    for a, b, c in zip(got, wanted, (each[0], each[1].sum(0), each[2]), strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-7, atol=1e-4 * float(jnp.max(jnp.abs(b))))
        chex.assert_trees_all_close(c, b, rtol=1e-7, atol=1e-4 * float(jnp.max(jnp.abs(b))))


# -------------------------------------------------------------------------------------------------- shards


def _results(f, x, mean, columns):
    return f(x, mean, columns), *jax.grad(lambda *args: jnp.sum(f(*args)), (0, 1, 2))(x, mean, columns)


def _same(got, x, mean, columns, complement):
    wanted = _results(functools.partial(_plain, complement=complement), x, mean, columns)
    for a, b in zip(jax.device_get(got), wanted, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-7, atol=1e-4 * float(jnp.max(jnp.abs(b))))


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("complement", rest_slow([True, False]))
@pytest.mark.parametrize(
    ("spec", "p"), rest_slow([((("data", "tensor"), None), 12), (("data", None), 4), ((None, "data"), 4)])
)
def test_shards_give_what_whole_arrays_give(axis_type, complement, p, spec, cpu_mesh, put):
    x, mean, columns = _inputs((256,), 16, p, share=1.0)
    mesh = cpu_mesh({"data": 4, "tensor": 2}, axis_type)
    with jax.set_mesh(mesh):
        sharded = put(x, mesh, *spec), put(mean, mesh, None), put(columns, mesh, None, "tensor")
        got = jax.jit(functools.partial(_results, functools.partial(_op, complement=complement, block=64)))(*sharded)
    _same(got, x, mean, columns, complement)


@pytest.mark.eight_devices
@pytest.mark.parametrize("complement", rest_slow([False, True]))
def test_op_and_gradients_work_within_shard_map(complement, cpu_mesh):
    x, mean, columns = _inputs((96,), 16, 4, share=1.0)
    mesh = cpu_mesh({"data": 8}, AxisType.Auto)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        functools.partial(_op, complement=complement, block=5),
        mesh=mesh,
        in_specs=(rows, whole, whole),
        out_specs=rows,
    )
    _same(jax.jit(functools.partial(_results, run))(x, mean, columns), x, mean, columns, complement)


def _collectives(text):
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {x: n for x in names if (n := text.count(f" {x}(") + text.count(f" {x}-start("))}


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", rest_slow([AxisType.Auto, AxisType.Explicit]))
@pytest.mark.parametrize("form", rest_slow(FORMS))
def test_rows_on_many_devices_need_no_collective(axis_type, form, tpu_mesh, cpu_mesh):
    for mesh in (cpu_mesh({"data": 8}, axis_type), tpu_mesh({"data": 16}, axis_type)):
        text = _compile_sharded(mesh, form, ("data", None), (None, None)).as_text()
        assert _collectives(text) == {}, mesh


def test_a_split_complement_needs_one_sum_of_scores(tpu_mesh):
    mesh = tpu_mesh({"data": 8, "tensor": 2})
    text = _compile_sharded(mesh, "complement", ("data", None), (None, "tensor")).as_text()
    assert _collectives(text) == {"all-reduce": 1}


def _compile_sharded(mesh, form, rows, columns):
    with jax.set_mesh(mesh):

        def shape(shape, *spec):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

        x, c = shape((32768, 256), *rows), shape((256, 64), *columns)
        mean = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        run = jax.jit(lambda x, mean, c: subspace_residual(x, mean, **{form: c}, block=4096))
        return run.lower(x, mean, c).compile()


# ------------------------------------------------------------------------------- memory and other machines


@pytest.mark.parametrize("p", rest_slow([32, 100]))
@pytest.mark.parametrize("form", FORMS)
def test_strips_hold_coordinates_and_reconstructions_of_one_strip(form, p):
    n, d, block = 65536, 128, 1024
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, d), (d,), (d, p))]
    run = jax.jit(lambda x, mean, c: subspace_residual(x, mean, **{form: c}, block=block))
    temp = run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    # Coordinates of all rows would take more.
    assert temp <= 4 * 4 * block * d + 2 * 4 * n + 4 * 4 * d * d
    assert temp < 4 * n * p
    loss = jax.jit(
        jax.grad(lambda x, mean, c: jnp.sum(subspace_residual(x, mean, **{form: c}, block=block)), (0, 1, 2))
    )
    temp = loss.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temp <= 8 * 4 * block * d + 4 * 4 * n + 6 * 4 * d * d


CASES = [("complement", 726), ("basis", 768), ("basis", 64), ("basis", 810)]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "p"), CASES)
def test_a_million_rows_are_scored_on_a_tpu_without_what_is_between(form, p, topology, compile_for_tpu):
    shapes = ((1_000_000, 1536), jnp.bfloat16), ((1536,), jnp.float32), ((1536, p), jnp.bfloat16)
    compiled = compile_for_tpu(lambda x, mean, c: subspace_residual(x, mean, **{form: c}), *shapes, topology=topology)
    # Coordinates alone would take 2 p million bytes in bfloat16.
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * 2720 * (p + 1536) + (1 << 23)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "p", "dtype"), [(*x, jnp.bfloat16) for x in CASES] + [(*CASES[2], jnp.float32)])
def test_scores_and_gradients_of_a_million_rows_compile_for_tpus(form, p, dtype, topology, compile_for_tpu):
    shapes = ((1_000_000, 1536), dtype), ((1536,), jnp.float32), ((1536, p), dtype)

    def loss(x, mean, c):
        return jnp.sum(subspace_residual(x, mean, **{form: c}))

    compiled = compile_for_tpu(jax.value_and_grad(loss, (0, 1, 2)), *shapes, topology=topology)
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 27


@pytest.mark.parametrize("dtype", rest_slow([jnp.bfloat16, jnp.float32]))
@pytest.mark.parametrize(("form", "p"), CASES)
def test_a_million_rows_lower_for_cuda(form, p, dtype, lower_for_cuda):
    shapes = ((1_000_000, 1536), dtype), ((1536,), jnp.float32), ((1536, p), dtype)
    text = lower_for_cuda(lambda x, mean, c: subspace_residual(x, mean, **{form: c}), *shapes)
    assert f"1000000x{p}x" not in text


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"basis": None}, ValueError, "basis, complement: expected one of the two, got neither"),
        ({"complement": ones((6, 2))}, ValueError, "basis, complement: expected one of the two, got both"),
        ({"x": ones(())}, ValueError, r"x: expected rows \[..., d\] .* got shape \(\)"),
        ({"x": ones((0, 6))}, ValueError, "x: expected rows .* without empty axes"),
        ({"x": ones((3, 6), jnp.int32)}, TypeError, "x: expected float32, bfloat16 or float64, got int32"),
        ({"mean": ones((5,))}, ValueError, r"mean: expected shape \(6,\) .* got \(5,\)"),
        ({"mean": ones((6,), jnp.bfloat16)}, TypeError, "mean: expected float32 or float64, got bfloat16"),
        ({"basis": ones((6, 0))}, ValueError, r"basis: expected \(6, p\) with 1 <= p <= 6, got \(6, 0\)"),
        ({"basis": ones((5, 2))}, ValueError, r"basis: expected \(6, p\) .* got \(5, 2\)"),
        ({"basis": ones((6,))}, ValueError, r"basis: expected \(6, p\) .* got \(6,\)"),
        ({"basis": None, "complement": ones((6, 7))}, ValueError, r"complement: expected .* got \(6, 7\)"),
        ({"basis": ones((6, 2), jnp.float16)}, TypeError, "basis: expected float32, .* got float16"),
        ({"block": -1}, ValueError, "block: expected a positive number of rows, or None, got -1"),
        ({"implementation": "triton"}, ValueError, "implementation: expected one of .* got 'triton'"),
        ({"implementation": "mosaic_tpu"}, ValueError, "can't serve subspace_residual here: it has no kernel"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": jnp.zeros((3, 6)), "mean": jnp.zeros((6,)), "basis": jnp.zeros((6, 2))}
    with pytest.raises(error, match=message):
        subspace_residual(**(arguments | change))


def test_complement_of_the_whole_space_is_refused():
    with pytest.raises(ValueError, match=r"basis: expected \[..., d, p\] with 1 <= p < d, got \(4, 4\)"):
        complement_basis(jnp.eye(4))
    with pytest.raises(TypeError, match="basis: expected float32, bfloat16 or float64, got int32"):
        complement_basis(jnp.eye(4, dtype=int))
