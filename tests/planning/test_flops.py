"""What is counted in a traced function."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import planning, train


def test_count_matmul_flops_takes_the_largest_branch_and_counts_convolutions():
    def f(x, w):
        y = jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x)
        return y, jax.lax.conv_general_dilated(w, w[:1, :, :3], (1,), "SAME", feature_group_count=1)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 4)), jnp.ones((2, 6, 8)))
    assert planning.count_matmul_flops(jaxpr).flops == 2 * 2 * 4**3 + 2 * (2 * 1 * 8) * (6 * 3)


@pytest.mark.eight_devices
def test_count_matmul_flops_counts_shard_map_on_each_device():
    mesh = train.make_mesh(2, 2, 2)
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 4)), jnp.ones((4, 4)))
    assert planning.count_matmul_flops(jaxpr).flops == 8 * (2 * 4 * 4 * 4)
