"""Rows chosen by QR with column pivoting."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from subspace_jax import linalg


def test_pivot_rows_are_those_of_lapack():
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    expected = scipy.linalg.qr(x.T, pivoting=True, mode="r")[1][:5]
    np.testing.assert_array_equal(linalg.pivot_rows(jnp.asarray(x), 5), expected)


def test_pivot_rows_of_lower_rank_begin_with_independent_ones():
    x = jnp.asarray(np.kron(np.eye(2), np.ones((4, 2))), jnp.float32) * jnp.arange(1.0, 9.0)[:, None]
    assert linalg.pivot_rows(x, 4)[:2].tolist() == [7, 3]


@pytest.mark.parametrize("count", [0, 3])
def test_pivot_rows_refuses_other_counts(count):
    with pytest.raises(ValueError, match=r"count: expected 1 to 2 for rows of shape \(4, 2\)"):
        linalg.pivot_rows(jnp.ones((4, 2)), count)
    with pytest.raises(ValueError, match=r"x: expected rows \[n, k\], got shape \(1, 4, 2\)"):
        linalg.pivot_rows(jnp.ones((1, 4, 2)), 1)
