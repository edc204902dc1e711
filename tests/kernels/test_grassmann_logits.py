"""grassmann_logits and its cross-entropy: golden vectors, gradients, memory, shards, compiled programs."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.kernels.grassmann_logits import grassmann_cross_entropy, grassmann_logits

from ..variants import rest_slow
from .cases import ones

# Real heads: batch, width, classes, dimensions.
IMAGENET, IMAGENET_21K, VIT_21K = (1024, 2048, 1000, 8), (4096, 2048, 21_841, 16), (1024, 768, 21_841, 16)


def plain(x, bases, gamma=25.0):
    """The formula as it is written; its gradient at a zero projection is NaN."""
    z = jnp.einsum("...n,cnk->...ck", x, bases, precision=jax.lax.Precision.HIGHEST)
    return gamma * jnp.linalg.norm(z, axis=-1)


def problem(seed, *sizes, dtype=jnp.float32):
    *leading, n, classes, k = sizes
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (*leading, n), dtype)
    bases = jax.random.normal(keys[1], (classes, n, k), dtype) / np.sqrt(n)
    return x, bases, jax.random.normal(keys[2], (*leading, classes), dtype)


def gradients(f, x, bases, weights, gamma):
    def total(x, bases, gamma):
        return jnp.sum(weights * f(x, bases, gamma))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, bases, gamma)


def error(got, wanted):
    """Largest error relative to the largest entry."""
    got, wanted = (np.asarray(a, np.float64) for a in (got, wanted))
    return np.max(np.abs(got - wanted)) / np.max(np.abs(wanted))


# Golden vectors


def golden_bases(rows, dims):
    return jnp.asarray(rows.reshape(len(dims), int(dims[0]), -1).swapaxes(1, 2))


@pytest.mark.parametrize("block", rest_slow([2, None, 1]))
def test_loss_and_gradients_match_the_authors_code(x64, golden, block):
    g = golden("gcr/logits")
    y, gamma = jnp.asarray(g["y"]), float(g["gamma"])

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def loss(x, bases):
        return jnp.mean(grassmann_cross_entropy(unit(x), bases, y, gamma, block=block))

    x, bases = jnp.asarray(g["X"]), golden_bases(g["W"], g["dims"])
    logits = grassmann_logits(unit(x), bases, gamma, block=block)
    chex.assert_trees_all_close(logits, g["logits"], rtol=1e-10, atol=1e-12)
    value, (grad_x, grad_bases) = jax.value_and_grad(loss, argnums=(0, 1))(x, bases)
    chex.assert_trees_all_close(value, g["loss"], rtol=1e-10)
    chex.assert_trees_all_close(grad_x, g["grad_X"], rtol=1e-10, atol=1e-12)
    rows = np.asarray(grad_bases).swapaxes(1, 2).reshape(-1, x.shape[1])
    chex.assert_trees_all_close(rows, g["grad_W"], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_classes_of_each_dimension_match_the_oracle(x64, golden):
    g = golden("gcr/oracle_logits_mixed")
    x = jnp.asarray(g["X"])
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    offsets = np.cumsum([0, *g["dims"]])
    for c, (a, b) in enumerate(itertools.pairwise(offsets)):
        logits = grassmann_logits(x, jnp.asarray(g["W"][a:b].T[None]), float(g["gamma"]))
        chex.assert_trees_all_close(logits[:, 0], g["logits"][:, c], rtol=1e-10, atol=1e-12)


# Values and derivatives


SIZES = ((1, 1, 1, 1), (5, 3, 7, 2), (4, 9, 64, 3), (3, 8, 96, 8), (2, 3, 5, 13, 4), (6, 40, 5))


@pytest.mark.parametrize(
    ("sizes", "block"),
    rest_slow([((3, 8, 96, 8), 40), *((sizes, block) for sizes in SIZES for block in (None, 1, 3, 16, 500))]),
)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients_are_those_of_the_formula_for_any_shape_and_block(seed, sizes, block):
    with jax.enable_x64(True):
        x, bases, weights = problem(seed, *sizes, dtype=jnp.float64)
        op = functools.partial(grassmann_logits, block=block)
        chex.assert_trees_all_close(op(x, bases, -0.7), plain(x, bases, -0.7), rtol=1e-12, atol=1e-12)
        got, wanted = (gradients(f, x, bases, weights, -0.7) for f in (op, plain))
        for a, b in zip(got, wanted, strict=True):
            assert a.shape == b.shape
            assert error(a, b) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("block", [24, None])
def test_float32_is_within_1e_5_of_float64(block):
    with jax.enable_x64(True):
        x, bases, weights = problem(0, 64, 256, 100, 8, dtype=jnp.float64)
        wanted = plain(x, bases), *gradients(plain, x, bases, weights, 25.0)
    x, bases, weights = (a.astype(jnp.float32) for a in (x, bases, weights))
    op = functools.partial(grassmann_logits, block=block)
    # Sums of up to 6400 products: a few times the unit roundoff 6e-8, times the root of their number.
    for a, b in zip((op(x, bases), *gradients(op, x, bases, weights, 25.0)), wanted, strict=True):
        assert a.dtype == jnp.float32
        assert error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bases_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("block", [24, None])
def test_bfloat16_features_round_factors_to_bfloat16_and_sum_in_float32(bases_dtype, block):
    x, bases, weights = problem(0, 64, 256, 100, 8)
    x, bases = x.astype(jnp.bfloat16), bases.astype(bases_dtype)
    op = functools.partial(grassmann_logits, block=block)
    rounded = x.astype(jnp.float32), bases.astype(jnp.bfloat16).astype(jnp.float32)
    logits = op(x, bases)
    assert logits.dtype == jnp.float32
    assert error(logits, plain(*rounded)) < 1e-5
    got, wanted = gradients(op, x, bases, weights, 25.0), gradients(plain, *rounded, weights, 25.0)
    assert (got[0].dtype, got[1].dtype) == (jnp.bfloat16, bases_dtype)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < 2**-7  # one rounding of the weighted products, 2^-9, and one of the result


@pytest.mark.slow
def test_float16_features_are_computed_in_float32():
    x, bases, _ = problem(0, 8, 16, 5, 2)
    x = x.astype(jnp.float16)
    chex.assert_trees_all_close(grassmann_logits(x, bases), plain(x.astype(jnp.float32), bases), rtol=1e-5)
    assert jax.grad(lambda x: jnp.sum(grassmann_logits(x, bases)))(x).dtype == jnp.float16


def test_gradient_is_zero_where_a_projection_vanishes():
    bases = jnp.eye(4)[None, :, :2]
    x = jnp.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for a in gradients(grassmann_logits, x, bases, jnp.ones((2, 1)), 25.0):
        chex.assert_trees_all_equal(a, 0.0)


@pytest.mark.slow
def test_gamma_of_zero_still_has_its_gradient():
    x, bases, weights = problem(0, 4, 6, 3, 2)
    got = gradients(grassmann_logits, x, bases, weights, 0.0)
    chex.assert_trees_all_close(got[2], jnp.sum(weights * plain(x, bases, 1.0)), rtol=1e-5)
    chex.assert_trees_all_equal(got[1], 0.0)


@pytest.mark.slow
def test_works_under_vmap_of_either_argument_and_within_scan():
    x, bases, weights = problem(0, 3, 4, 6, 5, 2)
    several = jnp.stack([bases, 2 * bases, -bases])
    value = functools.partial(grassmann_logits, block=2)
    chex.assert_trees_all_close(jax.vmap(value, (0, None))(x, bases), plain(x, bases), rtol=1e-5)
    wanted = jnp.stack([plain(a, b) for a, b in zip(x, several, strict=True)])
    chex.assert_trees_all_close(jax.vmap(value)(x, several), wanted, rtol=1e-5)
    _, scanned = jax.lax.scan(lambda carry, pair: (carry, value(*pair)), None, (x, several))
    chex.assert_trees_all_close(scanned, wanted, rtol=1e-5)

    def total(x, bases, weights):
        return jnp.sum(weights * value(x, bases))

    got = jax.vmap(jax.grad(total, argnums=(0, 1)))(x, several, weights)
    for i in range(3):
        for a, b in zip(got, gradients(plain, x[i], several[i], weights[i], 25.0), strict=False):
            chex.assert_trees_all_close(a[i], b, rtol=1e-4, atol=1e-5)


# Cross-entropy


def plain_loss(x, bases, labels, gamma, smoothing):
    logits = plain(x, bases, gamma)
    target = (1 - smoothing) * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.sum((target + smoothing / logits.shape[-1]) * jax.nn.log_softmax(logits), axis=-1)


@pytest.mark.parametrize("smoothing", rest_slow([0.1, 0.0]))
def test_cross_entropy_is_that_of_the_logits(x64, smoothing):
    x, bases, _ = problem(0, 12, 9, 20, 3, dtype=jnp.float64)
    labels = jnp.arange(12) % 20
    op = functools.partial(grassmann_cross_entropy, label_smoothing=smoothing, block=8)
    loss = functools.partial(plain_loss, smoothing=smoothing)

    def both(f):
        def mean(x, bases, gamma):
            losses = f(x, bases, labels, gamma)
            return jnp.mean(losses), losses

        (_, losses), grads = jax.jit(jax.value_and_grad(mean, (0, 1, 2), has_aux=True))(x, bases, 3.0)
        return losses, grads

    (losses, got), (expected, wanted) = both(op), both(loss)
    chex.assert_trees_all_close(losses, expected, rtol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.slow
def test_a_label_out_of_range_gives_nan_there():
    x, bases, _ = problem(0, 3, 5, 4, 2)
    loss = grassmann_cross_entropy(x, bases, jnp.array([-1, 0, 4]))
    chex.assert_trees_all_equal(jnp.isnan(loss), np.array([True, False, True]))


# Shards

LAYOUTS = [
    (("data", None), ("tensor", None, None)),
    ((None, None), (("data", "tensor"), None, None)),
    (("data", None), (None, "tensor", None)),
    (("data", None), ("data", None, None)),
    ((None, None), (None, None, None)),
]


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", [LAYOUTS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS[1:])])
def test_shards_give_what_whole_arrays_give(layout, axis_type, cpu_mesh, put):
    mesh = cpu_mesh({"data": 4, "tensor": 2}, axis_type)
    x, bases, _ = problem(0, 16, 24, 40, 4)
    labels = jnp.arange(16) % 40

    def loss(x, bases, labels, gamma):
        return jnp.mean(grassmann_cross_entropy(x, bases, labels, gamma, label_smoothing=0.1, block=8))

    step = jax.value_and_grad(loss, (0, 1, 3))
    wanted = jax.jit(step)(x, bases, labels, 3.0)
    with jax.set_mesh(mesh):
        placed = put(x, mesh, *layout[0]), put(bases, mesh, *layout[1]), put(labels, mesh, layout[0][0])
        got = jax.device_get(jax.jit(step)(*placed, 3.0))
    chex.assert_trees_all_close(got[0], wanted[0], rtol=1e-5)
    for a, b in zip(got[1], wanted[1], strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.eight_devices
def test_explicit_shards_of_batch_and_classes_stay_split(cpu_mesh, put):
    mesh = cpu_mesh({"data": 4, "tensor": 2})
    x, bases, _ = problem(0, 16, 24, 40, 4)
    with jax.set_mesh(mesh):
        logits = grassmann_logits(put(x, mesh, "data", None), put(bases, mesh, "tensor", None, None))
    assert logits.sharding.spec == P("data", "tensor")


@pytest.mark.eight_devices
@pytest.mark.parametrize("axes", ["tensor", pytest.param(("tensor", "data"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("inside", rest_slow([True, False]))
def test_within_shard_map_the_loss_and_its_gradients_are_exact(axes, inside, cpu_mesh):
    mesh = cpu_mesh({"data": 2, "tensor": 4}, AxisType.Auto)
    x, bases, _ = problem(0, 16, 24, 40, 4)
    labels = (7 * jnp.arange(16)) % 40
    rows = P("data") if axes == "tensor" else P()

    def loss(x, bases, labels, gamma):
        return grassmann_cross_entropy(x, bases, labels, gamma, axis_name=axes, label_smoothing=0.1, block=3)

    def mean(x, bases, labels, gamma):
        value = jnp.mean(loss(x, bases, labels, gamma))
        return jax.lax.pmean(value, "data") if axes == "tensor" else value

    arrays = (rows, P(axes), P())
    specs = (rows, P(axes), rows, P())
    if inside:
        step = jax.shard_map(jax.value_and_grad(mean, (0, 1, 3)), mesh=mesh, in_specs=specs, out_specs=(P(), arrays))
    else:
        step = jax.value_and_grad(jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P()), (0, 1, 3))
    got = jax.device_get(jax.jit(step)(x, bases, labels, 3.0))
    wanted = jax.value_and_grad(lambda *a: jnp.mean(plain_loss(*a, 0.1)), (0, 1, 3))(x, bases, labels, 3.0)
    chex.assert_trees_all_close(got[0], wanted[0], rtol=1e-5)
    for a, b in zip(got[1], wanted[1], strict=True):
        assert error(a, b) < 1e-5


def _step(x, bases, labels):
    def loss(x, bases):
        return jnp.mean(grassmann_cross_entropy(x, bases, labels))

    return jax.value_and_grad(loss, (0, 1))(x, bases)


def _collectives(mesh, batch, n, classes, k, dtype):
    """Names and result shapes of the collectives of a step with split batch and classes."""
    specs = (
        ((batch, n), dtype, P("data")),
        ((classes, n, k), jnp.float32, P("tensor")),
        ((batch,), jnp.int32, P("data")),
    )
    shapes = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for s, t, p in specs]
    with jax.set_mesh(mesh):
        text = jax.jit(_step).lower(*shapes).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (.+?) ({names})(?:-start)?\(", text)


def _only_sums(found, batch, n, classes, k):
    """Whether only sums of the shards' losses, maxima and gradients travel: nothing of ``[batch, classes]``."""
    assert found
    for shape, name in found:
        assert name == "all-reduce", found
        for sizes in re.findall(r"\[([\d,]*)\]", shape):
            size = np.prod([int(s) for s in sizes.split(",") if s], dtype=int)
            assert size in (1, batch, batch * n, classes * n * k) or size < batch * n, found


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", rest_slow([AxisType.Auto, AxisType.Explicit]))
def test_no_logits_travel_between_cpu_devices(axis_type, cpu_mesh):
    mesh = cpu_mesh({"data": 2, "tensor": 4}, axis_type)
    found = _collectives(mesh, 4096, 16, 1024, 16, jnp.float32)  # two groups of classes
    _only_sums(found, 2048, 16, 256, 16)
    assert not any("2048,256" in shape or "256,2048" in shape for shape, _ in found)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_no_logits_travel_between_chips(axis_type, tpu_mesh):
    mesh = tpu_mesh({"data": 4, "tensor": 4}, axis_type)
    found = _collectives(mesh, 1024, 2048, 1000, 8, jnp.bfloat16)
    assert {name for _, name in found} == {"all-reduce"}, found
    assert not any(re.search(r"\[256,250\]|\[250,256\]", shape) for shape, _ in found), found


# Memory and compiled programs


def _shapes(batch, n, classes, k, dtype):
    return ((batch, n), dtype), ((classes, n, k), jnp.float32), ((batch, classes), jnp.float32)


def _vjp(x, bases, weights):
    return jax.vjp(grassmann_logits, x, bases)[1](weights)


def _temp(f, shapes):
    compiled = jax.jit(f).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_on_cpu_products_of_all_classes_are_never_there():
    batch, n, classes, k = 512, 64, 16_384, 16
    shapes = _shapes(batch, n, classes, k, jnp.float32)
    products, logits, block = 4 * batch * classes * k, 4 * batch * classes, 16 << 20
    assert _temp(grassmann_logits, shapes[:2]) <= logits + 2 * block < products / 2
    assert _temp(_vjp, shapes) <= 4 * logits + 2 * block < products / 2
    assert _temp(lambda x, bases, weights: jax.vjp(plain, x, bases)[1](weights), shapes) >= products


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    # In float32 the compiler takes many minutes for the largest head.
    [
        *itertools.product((IMAGENET, VIT_21K, IMAGENET_21K), [jnp.bfloat16]),
        (IMAGENET, jnp.float32),
        (VIT_21K, jnp.float32),
    ],
)
def test_on_tpus_neither_products_nor_cast_bases_are_written(sizes, dtype, topology, compile_for_tpu):
    batch, n, classes, _ = sizes
    shapes = _shapes(*sizes, dtype)
    logits, features, block = 4 * batch * classes, 4 * batch * n, 16 << 20

    def temp(f, shapes):
        return compile_for_tpu(f, *shapes, topology=topology).memory_analysis().temp_size_in_bytes

    assert temp(grassmann_logits, shapes[:2]) <= logits + features + block
    # A v5p keeps pieces of a group in its main memory: bases, products and their gradients.
    assert temp(_vjp, shapes) <= 2 * logits + 2 * features + 4 * block


def test_lowers_for_gpus_with_products_of_bfloat16(lower_for_cuda):
    text = lower_for_cuda(_vjp, *_shapes(*IMAGENET_21K, jnp.bfloat16))
    assert "custom_call @Sharding" not in text
    products = re.findall(r"stablehlo.dot_general.*", text)
    assert products
    assert all("bf16" in line for line in products)
    assert all(
        "HIGHEST" in line
        for line in re.findall(r"dot_general.*", lower_for_cuda(_vjp, *_shapes(*IMAGENET, jnp.float32)))
    )


# Errors


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": ones(())}, ValueError, r"x: expected features \[..., n\] without empty axes, got shape \(\)"),
        ({"x": ones((0, 4))}, ValueError, r"x: expected .* got shape \(0, 4\)"),
        ({"x": ones((2, 5))}, ValueError, r"bases: expected \[classes, 5, k\] .* got \(3, 4, 2\)"),
        ({"bases": ones((4, 2))}, ValueError, r"bases: expected \[classes, 4, k\] .* got \(4, 2\)"),
        ({"bases": ones((3, 4, 0))}, ValueError, r"bases: expected .* got \(3, 4, 0\)"),
        ({"x": ones((2, 4), jnp.int32)}, TypeError, "x: expected floating point, got int32"),
        ({"bases": ones((3, 4, 2), jnp.int32)}, TypeError, "bases: expected floating point, got int32"),
        ({"gamma": ones(3)}, ValueError, r"gamma: expected a scalar, got shape \(3,\)"),
        ({"block": 0}, ValueError, "block: expected a positive number of classes, or None, got 0"),
        ({"implementation": "triton"}, ValueError, "implementation: expected one of .* got 'triton'"),
        ({"implementation": "mosaic_tpu"}, ValueError, "can't serve grassmann_logits here: it has no kernel"),
    ],
)
def test_bad_arguments_are_refused(change, kind, message):
    arguments = {"x": jnp.ones((2, 4)), "bases": jnp.ones((3, 4, 2)), **change}
    with pytest.raises(kind, match=message):
        grassmann_logits(**arguments)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"labels": ones(3, jnp.int32)}, ValueError, r"labels: expected \[batch\] .* got labels \(3,\), x \(2, 4\)"),
        ({"labels": ones(2)}, TypeError, "labels: expected integers, got float32"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_of_the_loss_are_refused(change, kind, message):
    arguments = {"x": jnp.ones((2, 4)), "bases": jnp.ones((3, 4, 2)), "labels": jnp.zeros(2, int), **change}
    with pytest.raises(kind, match=message):
        grassmann_cross_entropy(**arguments)


@pytest.mark.slow
def test_lengths_and_gradients_of_features_of_any_size_are_those_of_float64(x64):
    size = np.array([1e-25, 1e-20, 1.0, 1e20, 1e25])[:, None]
    rng = np.random.default_rng(0)
    x, bases, weights = rng.normal(size=(5, 6)) * size, rng.normal(size=(3, 6, 2)), rng.normal(size=(5, 3))
    z = np.einsum("bn,cnk->bck", x, bases)
    want = np.linalg.norm(z, axis=-1)
    x32, bases32, weights32 = (jnp.asarray(y, jnp.float32) for y in (x, bases, weights))
    chex.assert_trees_all_close(grassmann_logits(x32, bases32, 1.0), want, rtol=1e-5)
    dx, dbases = jax.grad(lambda *args: jnp.sum(weights32 * grassmann_logits(*args, 1.0)), (0, 1))(x32, bases32)
    unit = (weights / want)[..., None] * z
    chex.assert_trees_all_close(dx, np.einsum("bck,cnk->bn", unit, bases), rtol=1e-4, atol=1e-5)
    exact = np.einsum("bck,bn->cnk", unit, x)
    chex.assert_trees_all_close(dbases, exact, rtol=1e-7, atol=1e-5 * np.abs(exact).max())
