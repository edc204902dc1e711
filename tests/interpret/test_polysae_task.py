"""Sparse autoencoders in the train loop: sharded, accumulated, resumed, on vectors and on a language model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import nn, train
from subspace_jax.interpret import polysae
from subspace_jax.interpret.polysae.activations import ResidualStream
from subspace_jax.interpret.polysae.task import PolySAETask

from ..train.common import data_of
from ..train.task_battery import TaskContract

D, M = 16, 32
SETTINGS = {"d_in": D, "d_sae": M, "k": 4, "ranks": (8, 4, 4), "dead_after": 1}
TOKENS = np.random.default_rng(0).integers(0, 200, (64, 8)).astype(np.int32)
ROWS = {
    "inputs": TOKENS,
    "segment_ids": np.where(np.arange(8) < 7, 1, 0) * np.ones_like(TOKENS),
    "positions": np.arange(8, dtype=np.int32) * np.ones_like(TOKENS),
}
MODEL = nn.CausalLMConfig.tiny(hidden_size=D, num_heads=2, num_kv_heads=2, head_dim=8, mlp_size=24, num_layers=3)


def vectors(examples, seed=0):
    drawn = polysae.planted_pairs(seed, examples, D, M)
    return {"inputs": drawn.inputs}


class _OnVectors(TaskContract):
    sparsifier, changes = "topk", {}

    def make(self):
        config = polysae.PolySAEConfig(**{**SETTINGS, **self.changes}, sparsifier=self.sparsifier)
        return PolySAETask(config), data_of(vectors(64), vectors(40, seed=1), 16)


class TestTopK(_OnVectors):
    pass


@pytest.mark.slow
class TestBatchTopK(_OnVectors):
    sparsifier = "batchtopk"


@pytest.mark.slow
class TestMatryoshka(_OnVectors):
    sparsifier, changes = "matryoshka", {"widths": (8, 16, 32)}


@pytest.mark.slow
class TestJumpReLU(_OnVectors):
    sparsifier = "jumprelu"


@pytest.mark.slow
class TestLinear(_OnVectors):
    changes = {"decoder": "linear", "rescale": True}


@pytest.mark.slow
class TestSeparate(_OnVectors):
    changes = {"decoder": "separate"}


@pytest.mark.slow
class TestOnALanguageModel(TaskContract):
    def make(self):
        config = polysae.PolySAEConfig(**SETTINGS)
        task = PolySAETask(config, stream=ResidualStream(MODEL, 2))
        return task, data_of(ROWS, {name: x[:40] for name, x in ROWS.items()}, 16)


SHARDED = {
    "topk": {},
    "batchtopk": {"sparsifier": "batchtopk", "k": 2.5},
    "matryoshka": {"sparsifier": "matryoshka", "widths": (8, 16, 32)},
    "jumprelu": {"sparsifier": "jumprelu"},
    "rescaled": {"decoder": "linear", "rescale": True},
}


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", SHARDED)
def test_loss_over_eight_devices_is_that_of_one_with_ties_and_dead_features(name):
    config = polysae.PolySAEConfig(**{**SETTINGS, **SHARDED[name]})
    task = PolySAETask(config)
    params, variables = task.init(jax.random.key(0))
    variables["steps_since_fired"] = jnp.asarray(np.arange(M) % 3, jnp.int32)
    x = vectors(8)["inputs"]
    batch = {"inputs": np.concatenate([x, x])}  # equal examples tie

    def value(params, batch):
        loss, (new, found) = train.gathered(task, task.loss)(params, variables, batch, key=None, step=jnp.asarray(3))
        return loss, (new["fired"], new["threshold"], found)

    found = []
    for mesh in (train.make_mesh(devices=jax.devices()[:1]), train.make_mesh(2, 1, 4)):
        compute = train.jit_on_mesh(jax.value_and_grad(value, has_aux=True), mesh, None)
        found.append(jax.device_get(compute(params, batch)))
    chex.assert_trees_all_close(found[1], found[0], rtol=1e-5, atol=1e-6)
