"""The Adam step within a subspace: its authors' runs, float64, shards, memory, and programs for machines not here."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from subspace_jax.kernels.projected_adam_step import projected_adam_step

from ..variants import rest_slow
from .cases import ones

LR, SCALE, DECAY = 0.05, 0.25, 0.1
INTERPRET = "mosaic_tpu_interpret"
DONATED = (0, 3, 4)


def _reference(w, grad, basis, mu, nu, count, lr=LR, *, b1=0.9, b2=0.999, eps=1e-6, scale=SCALE, decay=DECAY, side):
    """The formula in float64."""
    w, grad, basis, mu, nu = (np.asarray(x, np.float64) for x in (w, grad, basis, mu, nu))
    r = basis.swapaxes(-1, -2) @ grad if side == "left" else grad @ basis
    mu, nu = b1 * mu + (1 - b1) * r, b2 * nu + (1 - b2) * r**2
    step = lr * scale * np.sqrt(1 - b2 ** (count + 1)) / (1 - b1 ** (count + 1)) * mu / (np.sqrt(nu) + eps)
    update = basis @ step if side == "left" else step @ basis.swapaxes(-1, -2)
    return (w - update) * (1 - lr * decay), mu, nu


def _inputs(m, n, r, side="left", dtype=jnp.float32, leading=(), seed=0):
    rng = np.random.default_rng(seed)
    p, small = (m, (r, n)) if side == "left" else (n, (m, r))
    basis = np.linalg.qr(rng.normal(size=(*leading, p, r)))[0]
    mu, nu = rng.normal(size=(*leading, *small)), rng.uniform(0.5, 2, size=(*leading, *small))
    w, grad = rng.normal(size=(2, *leading, m, n))
    return [jnp.asarray(w, dtype), jnp.asarray(grad, dtype)] + [jnp.asarray(x, jnp.float32) for x in (basis, mu, nu)]


def _step(*args, count=3, **options):
    return projected_adam_step(*args, count, LR, scale=SCALE, weight_decay=DECAY, **options)


def _errors(got, args, side, count=3):
    wanted = _reference(*args, count, side=side)
    return [float(np.max(np.abs(np.asarray(a, np.float64) - b))) for a, b in zip(got, wanted, strict=True)]


def _check(got, args, side, count=3):
    w, mu, nu = _errors(got, args, side, count)
    if args[1].dtype == jnp.bfloat16:
        # R is a sum of products of numbers rounded to 2^-9 of themselves; the step, of size lr c N, follows it, and
        # weights up to 4 are rounded to 2^-9 of themselves.
        assert w <= 2.0**-6
        assert mu <= 2e-3
        assert nu <= 2e-4
    else:
        # The largest entries are about 5; a float32 sum of up to 1000 products keeps 1e-6 of that.
        assert max(w, mu, nu) <= 1e-5


@pytest.mark.parametrize("case", rest_slow(["wide_right", "tall_left", "tall_right", "wide_left"]))
def test_galore_runs_of_its_authors_code_are_reproduced(case, golden, x64):
    del x64
    data = golden("coso/galore_adamw")
    w, side, rank = jnp.asarray(data[f"{case}_W0"]), case.split("_")[1], int(data["rank"])
    m, n = w.shape
    mu = nu = jnp.zeros((rank, n) if side == "left" else (m, rank))
    for t, grad in enumerate(jnp.asarray(data[f"{case}_grads"])):
        if t % int(data["update_proj_gap"]) == 0:
            u, _, vt = jnp.linalg.svd(grad, full_matrices=False)
            signs = jnp.sign(jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0))[0]
            basis = (u * signs[None])[:, :rank] if side == "left" else (vt.T * signs[None])[:, :rank]
        w, mu, nu = projected_adam_step(
            w,
            grad,
            basis,
            mu,
            nu,
            t,
            data["lr"],
            b1=float(data["b1"]),
            b2=float(data["b2"]),
            eps=data["eps"],
            scale=data["scale"],
            weight_decay=data[f"{case}_weight_decay"],
            side=side,
        )
        chex.assert_trees_all_close(w, data[f"{case}_params"][t], rtol=1e-9, atol=1e-11)
    chex.assert_trees_all_close(mu, data[f"{case}_exp_avg"], rtol=1e-9, atol=1e-11)
    chex.assert_trees_all_close(nu, data[f"{case}_exp_avg_sq"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["gap1", "gap3_decay"])
def test_coso_runs_of_its_authors_code_are_reproduced(case, golden, x64):
    """With the bases of that code; moments and count start anew in every task."""
    del x64
    data = golden("coso/coso_adamw")
    w, grads = jnp.asarray(data[f"{case}_W0"]), data[f"{case}_grads"]
    options = {"eps": data[f"{case}_eps"], "weight_decay": data[f"{case}_weight_decay"]}
    for task in range(grads.shape[0]):
        mu = nu = jnp.zeros((int(data["proj_rank"]), w.shape[1]))
        for t, grad in enumerate(grads[task]):
            if task:
                grad = grad - data[f"{case}_history_projector"][task - 1] @ grad
            basis = jnp.asarray(data[f"{case}_projector"][task, t])
            w, mu, nu = projected_adam_step(w, jnp.asarray(grad), basis, mu, nu, t, data[f"{case}_lr"], **options)
            chex.assert_trees_all_close(w, data[f"{case}_params"][task, t], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", rest_slow([40, None]))
def test_step_is_that_of_float64(side, dtype, block):
    args = _inputs(70, 130, 6, side, dtype)
    for count in (0, 3, 1000):
        got = _step(*args, side=side, block=block, count=count)
        assert [x.dtype for x in got] == [dtype, jnp.float32, jnp.float32]
        _check(got, args, side, count)


@pytest.mark.slow
def test_first_step_of_optax_galore_is_had_with_corrected_eps():
    grad = jax.random.normal(jax.random.key(0), (24, 16))
    w = jax.random.normal(jax.random.key(1), (24, 16))
    tx = optax.contrib.galore(LR, rank=4, scale=SCALE)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(grad, tx.init(w), w)
    basis, zeros = state[0].projector, jnp.zeros((4, 16))
    got, *_ = projected_adam_step(
        w, grad, basis, zeros, zeros, 0, LR, eps=1e-8 * jnp.sqrt(1 - 0.999), scale=SCALE, weight_decay=0.0
    )
    # Optax takes 1 - 0.999 in float32, which is wrong by 5e-5 of itself, and both of its roots with it.
    assert jnp.max(jnp.abs(got - w - updates)) <= 1e-4 * jnp.max(jnp.abs(updates))


@pytest.mark.slow
def test_sides_are_transposes_of_each_other():
    w, grad, basis, mu, nu = _inputs(20, 33, 5, "right")
    right = _step(w, grad, basis, mu, nu, side="right")
    left = _step(w.T, grad.T, basis, mu.T, nu.T, side="left")
    for a, b in zip(right, left, strict=True):
        assert jnp.max(jnp.abs(a - b.T)) <= 1e-6


@pytest.mark.slow
def test_update_lies_in_the_span_of_the_basis(x64):
    del x64
    args = [x.astype(jnp.float64) for x in _inputs(30, 20, 4)]
    basis = jnp.linalg.qr(args[2])[0]
    update = projected_adam_step(args[0], args[1], basis, *args[3:], 2, LR)[0] - args[0]
    assert jnp.max(jnp.abs(update - basis @ (basis.T @ update))) <= 1e-14


@pytest.mark.slow
def test_float64_weights_keep_float64_moments_and_gradients_are_exact(x64):
    del x64
    args = [x.astype(jnp.float64) for x in _inputs(9, 14, 3)]
    plain = functools.partial(_plain, side="left")

    def gradients(f):
        return jax.jit(jax.grad(lambda *args: sum(jnp.sum(jnp.sin(y)) for y in f(*args)), range(5)))(*args)

    wanted = gradients(plain)
    for block in (None, 4):
        got = _step(*args, side="left", block=block)
        assert max(_errors(got, args, "left")) <= 1e-14
        chex.assert_trees_all_close(gradients(functools.partial(_step, block=block)), wanted, rtol=1e-12, atol=1e-13)


def _plain(w, grad, basis, mu, nu, side):
    del side
    r = basis.T @ grad
    mu, nu = 0.9 * mu + (1 - 0.9) * r, 0.999 * nu + (1 - 0.999) * r**2
    c = LR * SCALE * np.sqrt(1 - 0.999**4) / (1 - 0.9**4)
    return (w - c * basis @ (mu / (jnp.sqrt(nu) + 1e-6))) * (1 - LR * DECAY), mu, nu


@pytest.mark.parametrize("dtype", rest_slow([jnp.float32, jnp.bfloat16]))
@pytest.mark.parametrize(
    ("side", "shape", "block"),
    rest_slow(
        [
            ("right", (37, 530, 128), 16),
            ("left", (70, 130, 6), 128),
            ("left", (8, 5, 1), None),
            ("left", (530, 520, 9), None),
            ("right", (5, 140, 130), None),
        ]
    ),
)
def test_kernel_is_the_reference(side, shape, block, dtype):
    args = _inputs(*shape, side, dtype)
    _check(_step(*args, side=side, block=block, implementation=INTERPRET), args, side)


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    rest_slow(
        [
            ((37, 140, 6), 24, jnp.bfloat16),
            ((1, 1, 1), 1, jnp.float32),
            ((40, 150, 40), 150, jnp.float32),
            ((16, 128, 3), 7, jnp.bfloat16),
            ((23, 1, 5), 1, jnp.float32),
            ((9, 129, 2), 128, jnp.float32),
        ]
    ),
)
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_kernel_and_strips_are_the_formula_at_any_shape(shape, block, dtype, seed):
    args = _inputs(*shape, dtype=dtype, seed=seed)
    for options in ({"implementation": INTERPRET}, {"block": block, "implementation": "xla"}):
        _check(_step(*args, **options), args, "left")


@pytest.mark.parametrize("implementation", rest_slow(["xla", INTERPRET]))
def test_leading_axes_are_stacked_layers(implementation):
    args = _inputs(20, 30, 4, leading=(2, 3))
    got = _step(*args, implementation=implementation)
    _check(got, args, "left")
    mapped = jax.vmap(functools.partial(_step, implementation=implementation))(*args)
    for a, b in zip(got, mapped, strict=True):
        assert jnp.max(jnp.abs(a - b)) <= 1e-6


def test_numbers_may_be_traced_and_mapped_over():
    w, grad, basis, mu, nu = _inputs(12, 20, 3)

    def run(count, lr, b2):
        return projected_adam_step(w, grad, basis, mu, nu, count, lr, b2=b2, scale=SCALE, weight_decay=DECAY)

    got = jax.jit(jax.vmap(run))(jnp.arange(3), jnp.full(3, LR), jnp.full(3, 0.999))
    for i in range(3):
        _check([x[i] for x in got], (w, grad, basis, mu, nu), "left", i)


def test_scanned_steps_are_the_steps():
    w, grad, basis, mu, nu = _inputs(12, 20, 3)

    def body(carry, count):
        w, mu, nu = carry
        return _step(w, grad, basis, mu, nu, count=count), None

    got, _ = jax.lax.scan(body, (w, mu, nu), jnp.arange(4))
    for count in range(4):
        w, mu, nu = _reference(w, grad, basis, mu, nu, count, side="left")
    for a, b in zip(got, (w, mu, nu), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5


# ------------------------------------------------------------------------------------------------ shards


def _specs(side, rows, columns):
    small = (None, columns) if side == "left" else (rows, None)
    basis = (rows, None) if side == "left" else (columns, None)
    return [(rows, columns), (rows, columns), basis, small, small]


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("side", rest_slow(["left", "right"]))
@pytest.mark.parametrize(("rows", "columns"), rest_slow([("tensor", "data"), (None, "data"), ("data", None)]))
@pytest.mark.parametrize("block", rest_slow([64, None]))
def test_shards_give_what_whole_arrays_give(axis_type, side, rows, columns, block, cpu_mesh, put):
    args = _inputs(64, 128, 4, side)
    mesh = cpu_mesh({"data": 4, "tensor": 2}, axis_type)
    with jax.set_mesh(mesh):
        sharded = [put(x, mesh, *spec) for x, spec in zip(args, _specs(side, rows, columns), strict=True)]
        got = jax.jit(functools.partial(_step, side=side, block=block))(*sharded)
    _check(jax.device_get(got), args, side)


@pytest.mark.eight_devices
@pytest.mark.parametrize("implementation", rest_slow([INTERPRET, "xla"]))
def test_kernel_and_reference_serve_columns_within_shard_map(implementation, cpu_mesh):
    args = _inputs(24, 512, 4)
    mesh = cpu_mesh({"data": 4, "tensor": 2}, AxisType.Auto)
    specs = [PartitionSpec(*spec) for spec in _specs("left", None, ("data", "tensor"))]
    run = jax.shard_map(
        functools.partial(_step, implementation=implementation),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=(specs[0], specs[3], specs[4]),
        check_vma=implementation == "xla",
    )
    _check(jax.jit(run)(*args), args, "left")


@pytest.mark.eight_devices
@pytest.mark.parametrize("block", rest_slow([8, None]))
def test_rows_and_partial_gradients_are_summed_over_named_axes(block, cpu_mesh):
    args = _inputs(24, 32, 4)
    parts = jax.random.normal(jax.random.key(0), (4, 24, 32))
    parts = parts.at[0].add(args[1] - parts.sum(0))
    mesh = cpu_mesh({"data": 4, "tensor": 2}, AxisType.Auto)

    def run(w, parts, basis, mu, nu):
        return _step(w, parts[0], basis, mu, nu, axis_name=("data", "tensor"), block=block)

    rows, whole = PartitionSpec("tensor", None), PartitionSpec()
    in_specs = (rows, PartitionSpec("data", "tensor", None), rows, whole, whole)
    run = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=(rows, whole, whole))
    _check(jax.jit(run)(args[0], parts, *args[2:]), args, "left")


def _collectives(text):
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {x: n for x in names if (n := text.count(f" {x}(") + text.count(f" {x}-start("))}


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", rest_slow([AxisType.Explicit, AxisType.Auto]))
@pytest.mark.parametrize("side", rest_slow(["left", "right"]))
@pytest.mark.parametrize(("rows", "columns"), rest_slow([(None, "data"), ("data", None)]))
def test_split_columns_need_no_collective_and_split_rows_one_sum(axis_type, side, rows, columns, tpu_mesh, cpu_mesh):
    """For the right side the other way round."""
    free = (columns if side == "left" else rows) is not None
    for mesh in (cpu_mesh({"data": 8}, axis_type), tpu_mesh({"data": 16}, axis_type)):
        block = 256 if mesh.size == 8 else None
        text = _compile_sharded(mesh, side, rows, columns, block).as_text()
        assert _collectives(text) == ({} if free else {"all-reduce": 1}), mesh
        kernel = free and axis_type == AxisType.Explicit and mesh.size == 16
        assert ("tpu_custom_call" in text) == kernel


def _compile_sharded(mesh, side, rows, columns, block):
    with jax.set_mesh(mesh):
        shapes = [(2048, 2048), (2048, 2048), (2048, 128)] + 2 * [(128, 2048) if side == "left" else (2048, 128)]
        shapes = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
            for shape, spec in zip(shapes, _specs(side, rows, columns), strict=True)
        ]
        run = functools.partial(_step, side=side, block=block)
        return jax.jit(run, donate_argnums=DONATED).lower(*shapes).compile()


# ------------------------------------------------------------------------------- memory and other machines


def _shapes(m, n, r, side="left", dtype=jnp.bfloat16):
    basis, small = ((m, r), (r, n)) if side == "left" else ((n, r), (m, r))
    return [((m, n), dtype)] * 2 + [(basis, jnp.float32), (small, jnp.float32), (small, jnp.float32)]


@pytest.mark.parametrize("side", rest_slow(["left", "right"]))
def test_strips_hold_one_strip_of_the_update(side):
    m, n, r = (1024, 8192, 32) if side == "left" else (8192, 1024, 32)
    shapes = [jax.ShapeDtypeStruct(*x) for x in _shapes(m, n, r, side, jnp.float32)]
    run = jax.jit(functools.partial(_step, side=side, block=512), donate_argnums=DONATED)
    temp = run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    # Strips of W, G and the update, and of size r.
    assert temp <= 6 * 4 * 1024 * 512 + 8 * 4 * 512 * r
    assert temp < 4 * m * n


@pytest.mark.parametrize(("m", "n", "r", "side"), rest_slow([(4096, 14336, 128, "left"), (11000, 4096, 8, "left")]))
def test_a_tpu_program_is_the_kernel_and_writes_nothing_else(m, n, r, side, topology, compile_for_tpu):
    compiled = compile_for_tpu(functools.partial(_step, side=side), *_shapes(m, n, r, side), topology=topology)
    assert "tpu_custom_call" in compiled.as_text()
    # Not even R: what there is is the basis in bfloat16, padded, and what the compiler keeps for itself.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * m * max(r, 128) * 2 + (1 << 21)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("m", "n", "r"), [(4096, 14336, 128), (8192, 28672, 384), (8192, 8192, 128)])
def test_large_models_steps_compile_for_tpus(m, n, r, side, dtype, topology, compile_for_tpu):
    if side == "right" and n * r * 4 > 30 << 20:
        m, n = n, m
    compiled = compile_for_tpu(functools.partial(_step, side=side), *_shapes(m, n, r, side, dtype), topology=topology)
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * m * n // 10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "shape", [(4096, 14336, 128), pytest.param((8192, 28672, 384), marks=pytest.mark.slow)], ids=["shape0", "shape1"]
)
def test_step_lowers_for_cuda(shape, side, lower_for_cuda):
    text = lower_for_cuda(functools.partial(_step, side=side), *_shapes(*shape, side))
    assert "dot_general" in text
    assert "tpu_custom_call" not in text


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": ones((8,))}, ValueError, r"w: expected matrices \[..., m, n\] .* got shape \(8,\)"),
        ({"w": ones((0, 6))}, ValueError, r"w: expected .* without empty axes"),
        ({"w": ones((8, 6), jnp.int32)}, TypeError, "w: expected float32, bfloat16 or float64, got int32"),
        ({"grad": ones((6, 8))}, ValueError, r"grad: expected the shape of w, \(8, 6\), got \(6, 8\)"),
        ({"grad": ones((8, 6), jnp.float16)}, TypeError, "grad: expected .* got float16"),
        ({"basis": ones((6, 2))}, ValueError, r"basis: expected \(8, 'r'\) .* got \(6, 2\)"),
        ({"basis": ones((8, 0))}, ValueError, r"basis: expected .* 1 <= r <= 8"),
        ({"basis": ones((8, 9))}, ValueError, r"basis: expected .* 1 <= r <= 8"),
        ({"basis": ones((1, 8, 2))}, ValueError, r"basis: expected .* got \(1, 8, 2\)"),
        ({"basis": ones((8, 2), jnp.bfloat16)}, TypeError, "basis: expected float32 or float64, got bfloat16"),
        ({"mu": ones((6, 2))}, ValueError, r"mu: expected shape \(2, 6\) for side 'left'"),
        ({"nu": ones((2, 6), jnp.bfloat16)}, TypeError, "nu: expected moments .* got bfloat16"),
        ({"side": "both"}, ValueError, "side: expected 'left' or 'right', got 'both'"),
        ({"count": 1.0}, TypeError, "count: expected an integer scalar, got float32"),
        ({"count": ones(2, jnp.int32)}, TypeError, r"count: expected an integer scalar, got int32 of shape \(2,\)"),
        ({"b1": 1.0}, ValueError, r"b1: expected a decay in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, ValueError, r"b2: expected a decay in \[0, 1\), got -0.1"),
        ({"block": 0}, ValueError, "block: expected a positive number"),
        ({"implementation": "triton"}, ValueError, "implementation: expected one of .* got 'triton'"),
        ({"implementation": "mosaic_tpu"}, ValueError, "mosaic_tpu.* runs on TPUs"),
        ({"implementation": INTERPRET, "axis_name": "data"}, ValueError, "can't serve .* sum over devices"),
        ({"implementation": INTERPRET, "block": 3}, ValueError, "can't serve .* multiples of 128"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "w": jnp.zeros((8, 6)),
        "grad": jnp.zeros((8, 6)),
        "basis": jnp.zeros((8, 2)),
        "mu": jnp.zeros((2, 6)),
        "nu": jnp.zeros((2, 6)),
        "count": 0,
        "learning_rate": 0.1,
    }
    with pytest.raises(error, match=message):
        projected_adam_step(**(arguments | change))


def test_kernel_refuses_what_it_would_slow_down_or_cannot_hold():
    args = _inputs(6, 140, 8, "right")
    with pytest.raises(ValueError, match="can't serve projected_adam_step here: moments of 8 columns would be padded"):
        _step(*args, side="right", implementation=INTERPRET)
    shapes = [jax.ShapeDtypeStruct(*x) for x in _shapes(28672, 8192, 384, dtype=jnp.float32)]
    with pytest.raises(ValueError, match=r"can't serve .* a basis of shape \(28672, 384\) takes"):
        jax.eval_shape(functools.partial(_step, implementation=INTERPRET), *shapes)
