"""Projected optimizers compile ahead of time for a TPU slice, at the shapes of an 8B Llama's layers."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import optim, train


@pytest.mark.slow
@pytest.mark.parametrize("rank", [128, 1024])
@pytest.mark.parametrize("make", [optim.galore, optim.fira, optim.apollo])
def test_a_refresh_is_of_products_and_qr_and_a_step_takes_less_than_one_of_64_kernels(make, rank):
    """In float32 a kernel is of 235 MB, 15 MB a chip; GaLore's rank for models of 7B is 1024."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = train.make_mesh(data=1, fsdp=4, tensor=4, devices=devices)
    split = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    shapes = {"mlp": (32, 4096, 14336), "attn": (32, 4096, 4096)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for name, shape in shapes.items()}
    tx = make(1e-3, rank=rank)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(tx.init, params)
        shardings = train.opt_state_shardings(tx, params, {name: split for name in params})
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params)
        start = time.process_time(), time.perf_counter()
        compiled = lowered.compile()
        took = time.process_time() - start[0], time.perf_counter() - start[1]
    memory, text = compiled.memory_analysis(), compiled.as_text()
    share = 2 * 4096 * 14336 // len(devices)  # of one kernel
    basis = 4 * 14336 * rank // 4  # of one layer, split over one axis
    print(f"\n{make.__name__}, rank {rank}: compiled in {took[1]:.0f} s, {took[0]:.0f} s of them a processor's;")
    print(f"bytes per chip: {memory.argument_size_in_bytes} of arguments, {memory.temp_size_in_bytes} besides")
    # One slice of a stack is renewed and stepped at a time, in float32.
    assert memory.temp_size_in_bytes < share + 5 * basis
    assert not [name for name in ("svd", "eigh", "jacobi") if name in text.lower()]
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, params, state)))
    # Kernels and gradients are split over all chips; what is left of a subspace's state over one side of four.
    assert memory.argument_size_in_bytes < whole / 4
