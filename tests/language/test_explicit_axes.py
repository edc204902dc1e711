"""Fine-tuning on a mesh with Explicit axes, from a checkpoint folder: the results of Auto axes."""

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from subspace_jax import adapters, data, interop, language, optim, train

from .conftest import LLAMA

pytestmark = pytest.mark.eight_devices

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
EVERYWHERE = "re:layers/(attn|mlp)/.*"


@pytest.fixture(scope="module")
def rows(batch):
    return {name: np.tile(x, (4, 1)) for name, x in batch.items()}


def trained(rows, mesh, settings, tx, **options):
    """Two steps and an evaluation: the state, the metrics and the sums."""
    task = language.AdaptedLMTask(interop.read_config(LLAMA), settings, folder=LLAMA, **options)
    state, step = train.init_state(task, tx, mesh), train.jit_train_step(task, tx, mesh)
    place = train.batch_sharding(mesh)
    for _ in range(2):
        state, metrics = step(state, train.to_device(rows, place))
    sets = {"eval": data.eval_passes(rows, 8)}
    return state, metrics, train.evaluate(task, state, sets, mesh=mesh)


def both(run):
    """What a run gives on Auto and on Explicit axes."""
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        return [run(train.make_mesh(**SIZES, axis_type=mode)) for mode in (AxisType.Auto, AxisType.Explicit)]


@pytest.mark.parametrize(
    ("settings", "tx", "options"),
    [
        pytest.param({EVERYWHERE: adapters.LoRA(4, 8.0)}, optax.adamw(1e-2), {}, marks=pytest.mark.slow),
        ({EVERYWHERE: adapters.DoRA(4, 8.0)}, optax.adamw(1e-2), {"dtype": "bfloat16", "remat": "full"}),
        pytest.param(
            {EVERYWHERE: adapters.LoRA(4, 8.0)},
            optim.adaprelora(1e-2, scale=2.0),
            {"loss_chunk": 4, "probes": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora", "dora-bfloat16", "lora-adaprelora"],
)
@pytest.mark.slow
def test_fine_tuning_on_explicit_axes_gives_the_bits_of_auto_axes(rows, settings, tx, options):
    auto, explicit = both(lambda mesh: trained(rows, mesh, settings, tx, **options))
    chex.assert_trees_all_equal(explicit, auto)
    assert {x.sharding.mesh.axis_types for x in jax.tree.leaves(explicit[:2])} == {(AxisType.Explicit,) * 3}


@pytest.mark.slow
def test_rows_are_scored_on_explicit_axes_as_on_auto_axes(rows):
    def scores(mesh):
        task = language.CausalLMTask(interop.read_config(LLAMA), folder=LLAMA, loss_chunk=4)
        params = train.init_state(task, optax.identity(), mesh).params
        batches = list(data.eval_batches(rows, batch_size=8))
        return language.score_rows(task, params, batches, mesh), language.option_scores(task, params, batches, mesh)

    auto, explicit = both(scores)
    chex.assert_trees_all_equal(explicit, auto)
