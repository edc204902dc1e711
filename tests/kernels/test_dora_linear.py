"""DoRA's compose step and layer: the authors' runs, float64, what is kept, dropout, shards."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

from subspace_jax import kernels

from ..variants import rest_slow
from .cases import ones

compose, layer, norm = kernels.dora_compose, kernels.dora_linear, kernels.dora_weight_norm


def layer_args(tokens=(3, 5), rows=14, columns=10, rank=3, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((*tokens, rows), (rows, columns), (rows, rank), (rank, columns))
    x, w, a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    magnitude = jnp.asarray(rng.uniform(1, 5, columns), jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return x, w, a, b, magnitude


def plain_layer(x, w, a, b, magnitude, scale, detach=True):
    v = w + scale * a @ b
    n = jnp.sqrt(jnp.sum(v * v, axis=0))
    n = jax.lax.stop_gradient(n) if detach else n
    return jnp.matmul(x, v * (magnitude / n)[None], precision="highest")


@pytest.mark.parametrize(("prefix", "rtol"), [("f64", 1e-12), ("f32", 1e-5)])
def test_compose_and_its_gradients_are_those_of_the_authors_code(x64, golden, prefix, rtol):
    g = golden("dora/compose")
    base, lora, dout = (jnp.asarray(g[f"{prefix}_{name}"]) for name in ("base", "lora", "dout"))
    out, back = jax.vjp(
        lambda base, lora, mag: compose(base, lora, mag, float(g[f"{prefix}_s"])),
        base,
        lora,
        jnp.asarray(g[f"{prefix}_g"][0]),
    )
    assert out.dtype == base.dtype
    chex.assert_trees_all_close(out, g[f"{prefix}_out"], rtol=rtol, atol=rtol)
    for got, name in zip(back(dout), ("d_base", "d_lora", "d_g"), strict=True):
        chex.assert_trees_all_close(got, g[f"{prefix}_{name}"].reshape(got.shape), rtol=rtol, atol=10 * rtol)


def test_bfloat16_is_rounded_once(golden):
    g = golden("dora/compose")
    base, lora = (jnp.asarray(g[f"bf_{name}"].view(ml_dtypes.bfloat16)) for name in ("base", "lora"))
    out = np.asarray(compose(base, lora, jnp.asarray(g["bf_g32"][0]), float(g["bf_s"])))
    wanted = g["bf_out_fp32g"].view(ml_dtypes.bfloat16).astype(np.float64)
    exact = g["bf_exact_g32"]
    # One unit in the last place of the largest results, for fused multiply-adds may round differently.
    chex.assert_trees_all_close(out.astype(np.float64), wanted, rtol=2.0**-8, atol=1e-6)
    _, cancelling, ours, _ = g["bf_err"]
    assert np.max(np.abs(out.astype(np.float64) - exact)) <= min(1.01 * ours, cancelling / 3)


@pytest.mark.slow
def test_compose_has_the_derivatives_of_the_plain_formula(x64):
    rng = np.random.default_rng(0)
    base, lora, weights = (jnp.asarray(rng.normal(size=(2, 7, 5))) for _ in range(3))
    g = jnp.asarray(rng.uniform(0.5, 2, 5))

    def plain(base, lora, g):
        return (g[None, None] - 1) * base + g[None, None] * (0.7 * lora)

    def ours(base, lora, g):
        return compose(base, lora, g, 0.7)

    def gradients(f):
        return jax.grad(lambda *args: jnp.sum(weights * f(*args)), (0, 1, 2))(base, lora, g)

    want = gradients(plain)
    for got in (gradients(ours), gradients(jax.jit(ours)), gradients(jax.checkpoint(ours))):
        chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-13)
    mapped = jax.vmap(jax.grad(lambda *args: jnp.sum(ours(*args)), (0, 2)), (0, 0, None))(base, lora, g)
    single = jax.grad(lambda *args: jnp.sum(ours(*args)), (0, 2))(base[1], lora[1], g)
    jax.tree.map(lambda m, s: chex.assert_trees_all_close(m[1], s, rtol=1e-12), mapped, single)


def test_inner_is_kept_only_if_the_magnitude_is_trained():
    base = lora = jnp.ones((64, 32))
    g = jnp.ones(32)

    def kept(f, *args):
        return sum(x.size for x in jax.tree.leaves(jax.vjp(f, *args)[1]) if x.ndim == 2 and x.shape == base.shape)

    assert kept(lambda base, lora, g: compose(base, lora, g, 0.5), base, lora, g) == base.size
    assert kept(lambda base, lora: compose(base, lora, g, 0.5), base, lora) == 0


@pytest.mark.parametrize(("mode", "detach"), [("det", True), ("full", False)])
def test_layer_and_gradients_are_those_of_the_authors_code(x64, golden, mode, detach):
    g = golden("dora/grads")
    w, a, b, m, x, dout = (jnp.asarray(g[name]) for name in ("W", "A", "B", "m", "x", "dout"))
    run = functools.partial(layer, scale=float(g["s"]), detach_norm=detach)
    y, back = jax.vjp(lambda x, a, b, m: run(x, w.T, a, b, m), x, a.T, b.T, m)
    dx, da, db, dm = back(dout)
    for name, got in (("y", y), ("dx", dx), ("dA", da.T), ("dB", db.T), ("dm", dm)):
        chex.assert_trees_all_close(got, g[f"{mode}_{name}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detach", [True, False])
def test_every_gradient_is_that_of_the_plain_formula(x64, detach):
    args = layer_args(dtype=jnp.float64)

    def gradients(f):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), range(5))(*args)

    got = gradients(lambda *args: layer(*args, 0.7, detach_norm=detach))
    want = gradients(lambda *args: plain_layer(*args, 0.7, detach))
    chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_the_first_step_starts_from_the_layer_as_it_was():
    for dtype in (jnp.float32, jnp.bfloat16):
        x, w, a, b, _ = layer_args(dtype=dtype)
        b = jnp.zeros_like(b)
        chex.assert_trees_all_equal(layer(x, w, a, b, norm(w, a, b, 2.0), 2.0), unadapted(x, w))


def unadapted(x, w):
    return jnp.matmul(x, w, precision=None if x.dtype == jnp.bfloat16 else "highest")


def test_the_magnitude_scales_all_but_the_bias(x64):
    x, w, a, b, m = layer_args(dtype=jnp.float64)
    bias = jnp.arange(10.0)
    once = layer(x, w, a, b, m, 0.7, bias)
    chex.assert_trees_all_close(
        layer(x, w, a, b, 3 * m, 0.7, bias), 3 * (once - bias[None, None]) + bias[None, None], rtol=1e-12
    )


def test_dropout_reaches_the_adapter_and_the_correction_only(x64):
    x, w, a, b, m = layer_args(dtype=jnp.float64)
    dropped = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x / 0.5, 0.0)
    g = m / norm(w, a, b, 0.7)
    want = x @ w + (g[None, None] - 1) * (dropped @ w) + g[None, None] * 0.7 * (dropped @ a @ b)
    chex.assert_trees_all_close(layer(x, w, a, b, m, 0.7, dropped=dropped), want, rtol=1e-11, atol=1e-12)
    chex.assert_trees_all_close(layer(x, w, a, b, m, 0.7, dropped=x), layer(x, w, a, b, m, 0.7), rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    x, w, a, b, m = layer_args((64,), 96, 80, 4, jnp.bfloat16)
    got = layer(x, w, a, b, m, 0.5)
    want = plain_layer(*(y.astype(jnp.float32) for y in (x, w, a, b)), m, 0.5)
    assert got.dtype == jnp.bfloat16
    # The base product, x a and (x a) b are rounded to 2^-9 of themselves, and the result is.
    assert np.linalg.norm(got.astype(jnp.float32) - want) < 1e-2 * np.linalg.norm(want)


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", rest_slow([AxisType.Explicit, AxisType.Auto]))
def test_shards_give_what_one_device_does(cpu_mesh, put, mode):
    x, w, a, b, m = layer_args((8,), 16, 12, 4)

    def both(x, w, a, b, m):
        loss = lambda a, b, m: jnp.sum(jnp.sin(layer(x, w, a, b, m, 0.5)))  # noqa: E731
        return layer(x, w, a, b, m, 0.5), jax.grad(loss, (0, 1, 2))(a, b, m)

    want = both(x, w, a, b, m)
    mesh = cpu_mesh({"data": 4, "tensor": 2}, mode)
    with jax.set_mesh(mesh):
        placed = (
            put(x, mesh, "data", None),
            put(w, mesh, None, "tensor"),
            put(a, mesh),
            put(b, mesh, None, "tensor"),
            put(m, mesh, "tensor"),
        )
        got = jax.jit(both)(*placed)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tpus_keep_no_inner_for_a_frozen_magnitude(compile_for_tpu, topology):
    t, rows, columns, rank = 4096, 4096, 14336, 64
    bf16, one = jnp.bfloat16, t * columns * 2
    shapes = [
        ((t, rows), bf16),
        ((rows, columns), bf16),
        ((rows, rank), bf16),
        ((rank, columns), bf16),
        ((columns,), jnp.float32),
    ]

    def loss(x, w, a, b, m):
        return jnp.sum(jnp.square(layer(x, w, a, b, m, 0.5).astype(jnp.float32)))

    temporaries = [
        compile_for_tpu(jax.grad(loss, wrt), *shapes, topology=topology).memory_analysis().temp_size_in_bytes
        for wrt in ((2, 3), (2, 3, 4))
    ]
    # The base product, until it is composed; then inner as well.
    assert temporaries[0] < 1.1 * one < 1.9 * one < temporaries[1]


def test_compose_lowers_for_gpus(lower_for_cuda):
    shape = ((4096, 8192), jnp.bfloat16)
    assert "dot_general" not in lower_for_cuda(
        lambda x, y, g: compose(x, y, g, 0.5), shape, shape, ((8192,), jnp.float32)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora": ones((3, 5))}, ValueError, r"lora: expected the shape of base, \(3, 4\), got \(3, 5\)"),
        ({"g": ones(3)}, ValueError, r"g: expected one number for each output, \(4,\)"),
        ({"g": ones(4, jnp.bfloat16)}, TypeError, "g: expected float32 or float64, got bfloat16"),
        ({"lora": ones((3, 4), jnp.bfloat16)}, TypeError, "base, lora: expected both"),
        ({"scale": ones(2)}, ValueError, "scale: expected a scalar"),
        ({"implementation": "mosaic_tpu"}, ValueError, "dora_compose here: it has no kernel"),
    ],
)
def test_bad_input_of_compose_is_named(change, error, message):
    args = {"base": jnp.ones((3, 4)), "lora": jnp.ones((3, 4)), "g": jnp.ones(4), "scale": 0.5} | change
    with pytest.raises(error, match=message):
        compose(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ones((3, 13))}, ValueError, r"x: expected \[..., 14\].*got \(3, 13\)"),
        ({"x": ones((3, 14), jnp.int32)}, TypeError, "x: expected float32"),
        ({"w": ones((2, 14, 10)), "a": ones((2, 14, 3)), "b": ones((2, 3, 10))}, ValueError, "jax.vmap"),
        ({"b": ones((4, 10))}, ValueError, "b: expected"),
        ({"magnitude": ones(9)}, ValueError, r"magnitude: expected shape \(10,\)"),
        ({"magnitude": ones(10, jnp.bfloat16)}, TypeError, "magnitude: expected float32"),
        ({"bias": ones(9)}, ValueError, "bias: expected"),
        ({"dropped": ones((2, 14))}, ValueError, r"dropped: expected float32\(3, 5, 14\) like x"),
        ({"implementation": "mosaic_tpu"}, ValueError, "it has no kernel"),
    ],
)
def test_bad_input_of_the_layer_is_named(change, error, message):
    args = dict(zip(("x", "w", "a", "b", "magnitude"), layer_args(), strict=True)) | {"scale": 0.5} | change
    with pytest.raises(error, match=message):
        layer(**args)
