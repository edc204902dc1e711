"""The large recipes compile ahead of time for TPU slices, and their train step fits into memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from subspace_jax import language, train


def step_for_tpu(config, topology):
    """Compiles the whole train step of a config, optimizer included, for a TPU slice that needs not be there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = train.make_mesh(**config.mesh, devices=devices)
    model = config.model
    options = {"dtype": model.dtype, "remat": model.remat, "loss_chunk": model.loss_chunk}
    task = language.CausalLMTask(language.finetune.SIZES[model.size](), **options)
    tx = train.make_optimizer(config.optim, num_steps=1000, roles=task.roles())
    state, _ = train.state_shardings(task, tx, mesh)
    shape = (config.data.batch_size, config.data.length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "labels", "segment_ids", "positions")}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        return train.jit_train_step(task, tx, mesh).lower(state, batch).compile(), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "topology", "limit"),
    [
        ("llama3-8b", "v5e:4x4", 16e9),
        ("mistral-7b", "v5e:4x4", 16e9),
        ("qwen2-7b", "v5e:4x4", 16e9),
        ("llama3-70b", "v5p:4x4x8", 95e9),
    ],
)
def test_a_train_step_fits_the_slice_that_its_recipe_names(configs, variant, topology, limit):
    config = train.load_config(f"{configs / 'lm' / 'large.py'}:{variant}")
    compiled, state = step_for_tpu(config, topology)
    memory = compiled.memory_analysis()
    stored, results, shared, rest = (
        getattr(memory, f"{x}_size_in_bytes") for x in ("argument", "output", "alias", "temp")
    )
    chips = config.mesh.fsdp * config.mesh.tensor
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    print(f"\n{variant} bytes per chip: arguments {stored}, results beside them {results - shared}, rest {rest}")
    # Parameters and both moments are split over all chips, but for norms and biases; the state is donated.
    assert stored == pytest.approx(whole / chips, rel=0.02)
    assert stored + results - shared + rest < limit
