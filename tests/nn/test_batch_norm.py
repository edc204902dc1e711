"""Batch normalisation: whose statistics, and at what precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train


@pytest.fixture
def parts():
    """Images, scale, bias, running mean and variance."""
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (16, 3, 5, 4)).astype(np.float32)
    return x, *(rng.uniform(0.5, 1.5, 4).astype(np.float32) for _ in range(4))


def test_batch_norm_uses_the_biased_variance_and_keeps_the_unbiased_one(parts):
    x, scale, bias, mean, var = parts
    y, (new_mean, new_var) = jax.jit(lambda *p: nn.batch_norm(*p, train=True))(*parts)
    axes = (0, 1, 2)
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(new_mean, 0.9 * mean + 0.1 * x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(new_var, 0.9 * var + 0.1 * x.var(axes, ddof=1), rtol=1e-5)


def test_batch_norm_evaluates_with_the_running_statistics(parts):
    x, scale, bias, mean, var = parts
    y, statistics = nn.batch_norm(*parts)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-4, atol=1e-5)
    assert statistics == (mean, var) or all(a is b for a, b in zip(statistics, (mean, var), strict=True))
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    np.testing.assert_allclose(nn.batch_norm(x, ones, zeros, zeros, ones - np.float32(1e-5))[0], x, rtol=1e-6)


@pytest.mark.eight_devices
def test_batch_norm_of_a_sharded_batch_uses_global_statistics(parts):
    y, statistics = jax.jit(lambda *p: nn.batch_norm(*p, train=True))(*parts)
    mesh = train.make_mesh(2, 4, 1)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    split = (jax.device_put(parts[0], rows), *parts[1:])
    by_compiler = jax.jit(lambda *p: nn.batch_norm(*p, train=True))(*split)

    def mine(*parts):
        return nn.batch_norm(*parts, train=True, axis_name=("data", "fsdp"))

    spec = P(("data", "fsdp"))
    by_hand = jax.jit(
        jax.shard_map(mine, mesh=mesh, in_specs=(spec, P(), P(), P(), P()), out_specs=(spec, (P(), P())))
    )(*split)
    for got, new in (by_compiler, by_hand):
        # Sums of 240 numbers in another order.
        np.testing.assert_allclose(got, y, atol=2e-6)
        for a, b in zip(new, statistics, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_batch_norm_of_bfloat16_has_float32_statistics(parts):
    x, *rest = parts
    y, (mean, var) = nn.batch_norm(jnp.asarray(x, jnp.bfloat16), *rest, train=True)
    exact, (wide_mean, wide_var) = nn.batch_norm(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), *rest, train=True)
    assert y.dtype == jnp.bfloat16
    assert mean.dtype == var.dtype == jnp.float32
    np.testing.assert_array_equal(mean, wide_mean)
    np.testing.assert_array_equal(var, wide_var)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)


def test_batch_norm_is_exact_far_from_zero(parts):
    x = parts[0] * np.float32(0.01) + 1000
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    _, (_, var) = nn.batch_norm(x, ones, zeros, 1000 * ones, ones, train=True, momentum=0.0)
    expected = x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(var, expected, rtol=1e-5)


def test_batch_norm_refuses_other_channels_and_single_values(parts):
    x, *rest = parts
    with pytest.raises(ValueError, match="has 3 channels; got scale"):
        nn.batch_norm(x[..., :3], *rest)
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.batch_norm(x[:1, :1, :1], *rest, train=True)


@pytest.mark.eight_devices
@pytest.mark.slow
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_batch_norm_of_a_sharded_batch_is_exact_far_from_the_running_mean(parts, offset):
    x = parts[0] + np.float32(offset)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    exact = x.astype(np.float64)
    deviation = exact - exact.mean((0, 1, 2))
    want = deviation / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    rows = P(("data", "fsdp"))
    mesh = train.make_mesh(2, 4, 1)

    def run(x, axis_name=None):
        return nn.batch_norm(x, ones, zeros, zeros, ones, train=True, axis_name=axis_name)

    by_hand = jax.shard_map(lambda x: run(x, ("data", "fsdp")), mesh=mesh, in_specs=rows, out_specs=(rows, (P(), P())))
    for f, batch in ((run, x), (run, jax.device_put(x, NamedSharding(mesh, rows))), (by_hand, x)):
        y, (_, var) = jax.jit(f)(batch)
        np.testing.assert_allclose(y, want, atol=1e-5)
        np.testing.assert_allclose(var, 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1), rtol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(run(x)[0])))(x)
    with jax.enable_x64(True):
        wide = jax.grad(lambda x: jnp.sum(jnp.sin(run(x)[0])))(exact)
    np.testing.assert_allclose(slope, wide, atol=1e-5)
