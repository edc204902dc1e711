"""Projected optimizers compile ahead of time for a TPU slice, at the shapes of an 8B Llama's layers."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import optim, train


@pytest.mark.slow
def test_a_refresh_is_of_products_and_qr_and_a_step_takes_less_than_one_of_64_kernels():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = train.make_mesh(data=1, fsdp=4, tensor=4, devices=devices)
    split = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    shapes = {"mlp": (32, 4096, 14336), "attn": (32, 4096, 4096)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for name, shape in shapes.items()}
    tx = optim.galore(1e-3, rank=128)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(tx.init, params)
        shardings = train.follow_params(state, params, {name: split for name in params})
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    share = 2 * 4096 * 14336 // len(devices)  # of one kernel
    print(f"\nbytes per chip: {memory.argument_size_in_bytes} of arguments, {memory.temp_size_in_bytes} besides")
    # One slice of a stack is renewed at a time, in float32.
    assert memory.temp_size_in_bytes < 3 * share
    assert not [name for name in ("svd", "eigh", "jacobi") if name in text.lower()]
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, params, state)))
    # Kernels and gradients are split over all chips; what is left of a subspace's state over one side of four.
    assert memory.argument_size_in_bytes < whole / 4
