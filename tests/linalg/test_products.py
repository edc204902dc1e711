import jax
import numpy as np
import pytest

from subspace_jax import linalg


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_across_is_the_transposed_matrix_times_the_narrow_one_in_stacks_and_under_vmap(batch):
    g = jax.random.normal(jax.random.key(0), (*batch, 12, 20))
    x = jax.random.normal(jax.random.key(1), (*batch, 12, 4))
    expected = np.swapaxes(np.float64(g), -1, -2) @ np.float64(x)
    # Sums of twelve products of numbers of size 1.
    np.testing.assert_allclose(jax.jit(linalg.across)(g, x), expected, rtol=0, atol=1e-5)
    if batch:
        np.testing.assert_allclose(jax.vmap(linalg.across)(g, x), expected, rtol=0, atol=1e-5)
