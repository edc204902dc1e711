"""Positions of a grid at another size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn


@pytest.fixture
def table():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2 + 5 * 4, 3), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("new", [(9, 7), (3, 2), (4, 5)])
def test_resample_positions_with_antialias_equals_jax_image_resize(table, new):
    grid = table[2:].reshape(5, 4, 3)
    wanted = jax.image.resize(grid, (*new, 3), "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
    got = nn.resample_positions(table, (5, 4), new, antialias=True)
    # Both sum at most 16 products of numbers near 1 in float32.
    np.testing.assert_allclose(got[2:], wanted.reshape(-1, 3), atol=2e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_resample_positions_keeps_other_tokens_equal_grids_and_constants(table, antialias):
    assert nn.resample_positions(table, (5, 4), (5, 4), antialias=antialias) is table
    got = nn.resample_positions(table, (5, 4), (7, 3), antialias=antialias)
    assert got.shape == (2 + 21, 3)
    np.testing.assert_array_equal(got[:2], table[:2])
    ones = nn.resample_positions(jnp.ones((20, 1)), (5, 4), (8, 9), antialias=antialias)
    np.testing.assert_allclose(ones, 1.0, atol=1e-6)
    lead = nn.resample_positions(jnp.stack([table, 2 * table]), (5, 4), (7, 3), antialias=antialias)
    np.testing.assert_allclose(lead[1], 2 * got, rtol=1e-6, atol=1e-6)


def test_resample_positions_without_antialias_uses_the_sharper_kernel():
    # Halfway between samples Keys' kernel with a = -0.75 weighs -3/32, 19/32, 19/32, -3/32.
    line = jnp.eye(8)
    got = nn.resample_positions(line, (1, 8), (1, 4), antialias=False)
    np.testing.assert_allclose(got[1], [0, -0.09375, 0.59375, 0.59375, -0.09375, 0, 0, 0], atol=1e-6)


def test_resample_positions_refuses_other_grids(table):
    with pytest.raises(ValueError, match="a grid of 6 x 4 needs 24 rows, got 22"):
        nn.resample_positions(table, (6, 4), (2, 2), antialias=True)
    with pytest.raises(ValueError, match="expected grids with positive sides"):
        nn.resample_positions(table, (5, 4), (0, 2), antialias=True)
