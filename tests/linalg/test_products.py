import chex
import jax
import numpy as np
import pytest

from subspace_jax import linalg


@pytest.mark.parametrize("batch", [(2, 3), pytest.param((), marks=pytest.mark.slow)])
def test_gram_and_times_of_stacks_and_under_vmap_are_those_of_float64(batch):
    x = jax.random.normal(jax.random.key(0), (*batch, 12, 20))
    y = jax.random.normal(jax.random.key(1), (*batch, 12, 4))
    want = np.swapaxes(np.float64(x), -1, -2) @ np.float64(y)
    # Sums of twelve products of numbers of size 1.
    chex.assert_trees_all_close(jax.jit(linalg.gram)(x, y), want, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(linalg.times)(x.mT, y), want, rtol=0, atol=1e-5)
    if batch:
        chex.assert_trees_all_close(jax.vmap(linalg.gram)(x, y), want, rtol=0, atol=1e-5)
