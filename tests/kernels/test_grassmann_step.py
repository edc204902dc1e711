import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels, linalg
from subspace_jax.kernels.grassmann_step import lanes
from subspace_jax.kernels.grassmann_step.xla import defect
from subspace_jax.manifolds import grassmann

from ..variants import rest_slow
from .cases import ones


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(2048, 8), (64, 4), (256, 16)])
def test_defect_is_known_to_a_rounding_of_the_identity(n, k):
    s = grassmann.random_point(jax.random.key(0), n, k, (3,))
    exact = np.asarray(s, np.float64)
    # A plain sum of 2048 squares errs by five times as much.
    chex.assert_trees_all_close(jax.jit(defect)(s), exact.mT @ exact - np.eye(k), rtol=0, atol=1.2e-7)


step = kernels.grassmann_step
INTERPRET = "mosaic_tpu_interpret"


def inputs(n, k, lead, dtype=jnp.float32, seed=0):
    s = linalg.random_orthonormal(jax.random.key(seed), n, k, lead, dtype)
    grads, momentum = (jnp.asarray(gaussian(seed + i, *s.shape) / np.sqrt(n), dtype) for i in (1, 2))
    return s, grads, momentum


def by_svd(s, grads, momentum, size, decay=0.9, weight=1.0):
    """The published step, in float64."""
    s, grads, momentum = (np.asarray(x, np.float64) for x in (s, grads, momentum))
    d = decay * momentum + weight * grads
    h = -size * (d - s @ (s.mT @ d))
    u, sigma, rt = np.linalg.svd(h, full_matrices=False)
    sigma = sigma[..., None, :]
    return ((s @ rt.mT) * np.cos(sigma) + u * np.sin(sigma)) @ rt, d


@pytest.mark.slow
@pytest.mark.parametrize(
    ("retraction", "implementation"),
    [("exp", "xla"), ("exp", INTERPRET), ("qr", "xla"), ("polar", "xla"), ("cayley", "xla")],
)
def test_long_steps_of_unequal_columns_are_orthonormal(retraction, implementation):
    # In R^5 a direction of four columns has rank 1.
    for shape in ((12, 3), (5, 4)):
        s = linalg.random_orthonormal(jax.random.key(0), *shape)
        turn = np.linalg.qr(gaussian(2, shape[1], shape[1]))[0]
        grads = jnp.asarray(gaussian(1, *shape) * np.geomspace(1, 1e-6, shape[1]) @ turn, jnp.float32)
        sizes = jnp.asarray([1.0, 5.0, 1e2, 1e4, 1e8], jnp.float32)
        args = (jnp.broadcast_to(x, (5, *shape)) for x in (s, grads))
        options = {"retraction": retraction, "implementation": implementation, "transport": "parallel"}
        new, carried = step(*args, jnp.zeros((5, *shape)), sizes, **options)
        exact = np.asarray(new, np.float64)
        assert np.max(np.abs(exact.mT @ exact - np.eye(shape[1]))) < 2e-6
        assert np.all(np.isfinite(carried))


def test_step_is_the_published_one_in_float64(x64):
    args = inputs(40, 4, (2, 3), jnp.float64)
    got = step(*args, 0.3, decay=0.8, weight=0.7)
    for g, w in zip(got, by_svd(*args, 0.3, 0.8, 0.7), strict=True):
        chex.assert_trees_all_close(g, w, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", INTERPRET])
@pytest.mark.parametrize(("n", "k"), [(130, 3), (128, 8), (2048, 1), (37, 5)])
def test_step_in_float32_is_near_float64(implementation, n, k):
    args = inputs(n, k, (5,))
    got = step(*args, 0.3, implementation=implementation)
    for g, w in zip(got, by_svd(*args, 0.3), strict=True):
        # Columns of bases in float32: the old one was orthonormal to 5e-7, and QR or polar factors part by that much.
        chex.assert_trees_all_close(g, w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("transport", rest_slow(["parallel", "euclidean", "project"]))
@pytest.mark.parametrize("with_momentum", rest_slow([True, False]))
@pytest.mark.parametrize("remove_drift", rest_slow([True, False]))
def test_kernel_is_the_reference(transport, with_momentum, remove_drift):
    s, grads, momentum = inputs(70, 3, (3, 3))
    momentum = momentum if with_momentum else None
    sizes = jnp.linspace(0.0, 2.0, 9).reshape(3, 3)
    how = {"transport": transport, "remove_drift": remove_drift}
    # Groups of 4: the last one has three lanes without a class.
    got = step(s, grads, momentum, sizes, **how, implementation=INTERPRET, block=4)
    want = step(s, grads, momentum, sizes, **how, implementation="xla")
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_kernel_keeps_bases_orthonormal_after_every_step():
    s, _, momentum = inputs(256, 8, (3,))
    for i in range(20):
        grads = jnp.asarray(gaussian(i, *s.shape) / 16)
        s, momentum = step(s, grads, momentum, 0.1, remove_drift=i % 5 == 0, implementation=INTERPRET)
        exact = np.asarray(s, np.float64)
        assert np.max(np.linalg.norm(exact.mT @ exact - np.eye(8), axis=(1, 2))) < 1e-6


@pytest.mark.slow
def test_kernel_removes_drift_and_stops_at_64_radians():
    s, grads, momentum = inputs(64, 4, (2,))
    drifted = s + 1e-3 * jnp.asarray(gaussian(7, *s.shape)) / 8
    new, _ = step(drifted, grads, momentum, 0.1, implementation=INTERPRET)
    assert np.max(grassmann.orthonormality_error(new)) < 1e-6
    for length in (10.0, 1e3, 1e7):
        new, _ = step(s, grads, momentum, length, implementation=INTERPRET)
        assert np.max(grassmann.orthonormality_error(new)) < 1e-5


@pytest.mark.slow
def test_matrices_in_lanes_are_those_in_the_last_axes():
    m = gaussian(0, 20, 5, 5)
    m = jnp.asarray(m @ m.mT) * jnp.linspace(0, 30, 20)[:, None, None]
    there, back = (lambda x: jnp.moveaxis(x, 0, -1)), (lambda x: jnp.moveaxis(x, -1, 0))
    for got, want in zip(jax.jit(lanes.LANES.versine_sinc)(there(m)), linalg.versine_sinc_sqrt(m), strict=True):
        # Errors are a few times 1 + norm roundings, with norms up to 600.
        chex.assert_trees_all_close(back(got), want, rtol=0, atol=2e-4)
    e = 1e-2 * (m / linalg.times(m, m).max())
    q = back(jax.jit(lanes.LANES.inverse_factor)(there(e)))
    whole = np.eye(5) + np.asarray(q, np.float64)
    chex.assert_trees_all_close(
        whole.mT @ (np.eye(5) + np.asarray(e, np.float64)) @ whole, np.eye(5)[None] + 0 * e, rtol=1e-7, atol=1e-8
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", INTERPRET])
def test_step_under_vmap_is_that_of_each(implementation):
    args = inputs(64, 4, (2, 3))
    whole = step(*args, 0.3, implementation=implementation)
    mapped = jax.vmap(lambda *args: step(*args, 0.3, implementation=implementation))(*args)
    chex.assert_trees_all_close(mapped, whole, rtol=0, atol=1e-6)


@pytest.mark.eight_devices
@pytest.mark.parametrize("mode", rest_slow([AxisType.Explicit, AxisType.Auto]))
@pytest.mark.parametrize(
    "spec", rest_slow([P("data", "model"), P("data"), P(None, "model")]), ids=["both", "classes", "n"]
)
def test_the_op_over_devices_is_that_of_one(mode, spec):
    args = inputs(512, 4, (8,))
    want = step(*args, 0.3)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(mode, mode))
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x in args]
        got = jax.jit(lambda *args: step(*args, 0.3))(*spread)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("implementation", ["xla", INTERPRET])
def test_under_shard_map_classes_of_a_shard_are_its_own(implementation):
    args = inputs(64, 4, (8,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda *args: step(*args, 0.3, implementation=implementation),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=implementation == "xla",
    )
    jax.tree.map(
        lambda g, w: chex.assert_trees_all_close(g, w, rtol=0, atol=2e-6), jax.jit(run)(*args), step(*args, 0.3)
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1000, 2048, 8), (21841, 768, 16)], ids=str)
def test_tpus_read_and_write_each_array_once(compile_for_tpu, topology, sizes):
    c, n, k = sizes
    shape = (sizes, jnp.float32)
    compiled = compile_for_tpu(
        lambda s, g, m: step(s, g, m, 0.1), shape, shape, shape, topology=topology, donate_argnums=(0, 2)
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 1e6
    assert compiled.cost_analysis()["bytes accessed"] < 1.01 * 20 * c * n * k


@pytest.mark.slow
def test_classes_split_over_chips_need_no_collective(tpu_mesh):
    mesh = tpu_mesh({"data": 16})
    arg = jax.ShapeDtypeStruct((1600, 2048, 8), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(lambda *args: step(*args, 0.1)).lower(arg, arg, arg).compile().as_text()
    assert "tpu_custom_call" in text
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all"))


def test_step_lowers_for_gpus(lower_for_cuda):
    shape = ((1000, 2048, 8), jnp.float32)
    assert "tpu_custom_call" not in lower_for_cuda(lambda *args: step(*args, 0.1), shape, shape, shape)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bases": ones((3, 4))}, ValueError, r"bases: expected \[..., n, k\] with 1 <= k <= n"),
        ({"bases": ones((2, 4, 0))}, ValueError, "bases: .*empty"),
        ({"bases": ones((2, 8, 3), jnp.bfloat16)}, TypeError, "bases: expected float32 or float64, got bfloat16"),
        ({"grads": ones((2, 8, 4))}, ValueError, r"grads: expected the shape of bases, \(2, 8, 3\)"),
        ({"momentum": ones((2, 8, 3), jnp.bfloat16)}, TypeError, "momentum: expected the dtype of bases"),
        ({"learning_rate": ones(3)}, ValueError, r"learning_rate: expected a scalar or shape \(2,\)"),
        ({"transport": "vector"}, ValueError, "transport: expected one of"),
        ({"retraction": "svd"}, ValueError, "retraction: expected one of"),
        ({"block": 129}, ValueError, "block: expected 1 to 128 bases"),
        ({"implementation": "mosaic_gpu"}, ValueError, "implementation: expected one of"),
        ({"implementation": "mosaic_tpu"}, ValueError, "runs on TPUs, this program is for cpu"),
        ({"implementation": INTERPRET, "retraction": "qr"}, ValueError, "'exp' only, got 'qr'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    args = dict.fromkeys(("bases", "grads", "momentum"), jnp.ones((2, 8, 3))) | {"learning_rate": 0.1} | change
    with pytest.raises(error, match=message):
        step(**args)


def test_the_reference_asks_for_no_eigenvalues():
    # The compiler would gather all k x k matrices on every device for them, 160 GiB of ten million classes.
    bases = jax.ShapeDtypeStruct((4, 32, 4), jnp.float32)

    def text(platform):
        step = functools.partial(kernels.grassmann_step, implementation="xla", learning_rate=0.1)
        return jax.jit(step).trace(bases, bases, bases).lower(lowering_platforms=(platform,)).as_text().lower()

    assert not any(word in text(platform) for word in ("eigh", "syevd") for platform in ("tpu", "cpu"))
