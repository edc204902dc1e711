"""Sparse autoencoders in the train loop: sharded, accumulated, resumed, on vectors and on a language model."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import interop, nn, train
from subspace_jax.interpret import polysae
from subspace_jax.interpret.polysae import run, sparsify
from subspace_jax.interpret.polysae.activations import ResidualStream
from subspace_jax.interpret.polysae.shards import Shards
from subspace_jax.interpret.polysae.task import PolySAETask

from ..train.common import data_of
from ..train.task_battery import TaskContract

D, M = 16, 32
SETTINGS = {"d_in": D, "d_sae": M, "k": 4, "ranks": (8, 4, 4), "dead_after": 1}
SMALL = polysae.PolySAEConfig(8, 24, 3, (8, 4, 3))
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
    sparsifier, changes = "topk", types.MappingProxyType({})

    def make(self):
        config = polysae.PolySAEConfig(**{**SETTINGS, **self.changes}, sparsifier=self.sparsifier)
        return PolySAETask(config), data_of(vectors(64), vectors(40, seed=1), 16)


@pytest.mark.slow
class TestTopK(_OnVectors):
    pass


@pytest.mark.slow
class TestBatchTopK(_OnVectors):
    sparsifier = "batchtopk"


@pytest.mark.slow
class TestMatryoshka(_OnVectors):
    sparsifier, changes = "matryoshka", types.MappingProxyType({"widths": (8, 16, 32)})


@pytest.mark.slow
class TestJumpReLU(_OnVectors):
    sparsifier = "jumprelu"


@pytest.mark.slow
class TestLinear(_OnVectors):
    changes = types.MappingProxyType({"decoder": "linear", "rescale": True})


@pytest.mark.slow
class TestSeparate(_OnVectors):
    changes = types.MappingProxyType({"decoder": "separate"})


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
@pytest.mark.parametrize(
    "name", ["batchtopk", *(pytest.param(n, marks=pytest.mark.slow) for n in SHARDED if n != "batchtopk")]
)
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


@pytest.mark.eight_devices
def test_topk_over_sharded_features_keeps_the_first_of_equal_entries():
    pre = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (4, 32)).astype(np.float32))
    mesh = train.make_mesh(2, 1, 4)
    shards, specs = Shards(("data",), ("tensor",)), (P("data", "tensor"), P("data"))

    def search(pre):
        code = sparsify.topk_code(pre, 5, shards)
        return code.values, code.indices

    found = jax.jit(
        jax.shard_map(search, mesh=mesh, in_specs=specs[:1], out_specs=(specs[1], specs[1]), check_vma=False)
    )(pre)
    expected = sparsify.topk_code(pre, 5)
    np.testing.assert_array_equal(found[0], expected.values)
    np.testing.assert_array_equal(found[1], expected.indices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of three layers in a folder, and its parameters."""
    path = tmp_path_factory.mktemp("model")
    params = nn.init_params(jax.random.key(0), MODEL)
    interop.save_causal_lm(path, MODEL, params, overwrite=True)
    return path, params


def test_the_stream_after_two_layers_is_the_hidden_state_of_the_whole_model(folder):
    path, params = folder
    stream = ResidualStream(MODEL, 2, folder=path)
    shapes = jax.eval_shape(stream.init, jax.random.key(0))
    mesh = train.make_mesh(devices=jax.devices()[:1])
    with train.use_mesh(mesh):
        kept = stream.load(train.param_shardings(shapes, stream.axes, mesh))
    chex.assert_trees_all_equal_shapes(kept, shapes)
    batch = {name: jnp.asarray(x[:4]) for name, x in ROWS.items()}
    x, weights = jax.jit(stream)(kept, batch)
    positions = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    whole = nn.causal_lm_apply(MODEL, params, batch["inputs"], capture_hidden=True, with_logits=False, **positions)
    np.testing.assert_allclose(x.reshape(4, 8, D), whole.hidden[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(weights.reshape(4, 8), np.tile([0, 1, 1, 1, 1, 1, 1, 0], (4, 1)))


def test_an_edit_of_a_layer_changes_what_follows_and_nothing_before(folder):
    batch = jnp.asarray(TOKENS[:2])
    run_with = functools.partial(nn.causal_lm_apply, MODEL, folder[1], batch, capture_hidden=True)
    plain = run_with().hidden
    edited = run_with(options=nn.LayerOptions(edit=(1, lambda x: 2 * x))).hidden
    np.testing.assert_array_equal(edited[:2], plain[:2])
    np.testing.assert_allclose(edited[2], 2 * plain[2], rtol=1e-6)
    assert not np.allclose(edited[3], plain[3])


def test_a_run_centers_and_scales_by_medians_of_its_sample_and_outliers_do_not_count(folder):
    path, _ = folder
    stream = ResidualStream(MODEL, 2, folder=path)
    sample = {name: x[:16] for name, x in ROWS.items()}
    task = PolySAETask(polysae.PolySAEConfig(**SETTINGS), stream=stream, scale=0.0, sample=sample)
    mesh = train.make_mesh(devices=jax.devices()[:1])
    shapes, axes = jax.eval_shape(task.init, jax.random.key(0)), task.axes()
    shardings = tuple(train.param_shardings(s, a, mesh) for s, a in zip(shapes, axes, strict=True))
    with train.use_mesh(mesh):
        params, variables = task.load(shardings)
        again = task.restore_frozen(variables, shardings[1])["model"]
    x, weights = jax.jit(task.activations)(variables, {name: jnp.asarray(v) for name, v in sample.items()})
    counted = np.asarray(x)[np.asarray(weights) > 0]
    np.testing.assert_array_equal(params["b_dec"], 0)
    np.testing.assert_allclose(np.median(counted, axis=0), 0, atol=1e-5)
    assert np.median(np.linalg.norm(counted, axis=1)) == pytest.approx(4, rel=1e-4)
    far = {**variables, "center": variables["center"] + 11}
    assert not np.asarray(jax.jit(task.activations)(far, {n: jnp.asarray(v) for n, v in sample.items()})[1]).any()
    assert task.frozen == ("model",)
    chex.assert_trees_all_equal(again, variables["model"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualStream(MODEL, 4), "layer: expected 1 to 3, the layers of the model, got 4"),
        (lambda: ResidualStream(MODEL, 1, skip=-1), "skip: expected at least 0"),
        (
            lambda: PolySAETask(polysae.PolySAEConfig(8, 24, 3, (8, 4, 3)), stream=ResidualStream(MODEL, 1)),
            "d_in: expected 16",
        ),
        (
            lambda: PolySAETask(polysae.PolySAEConfig(8, 24, 3, (8, 4, 3)), scale=0.0),
            "scale: expected a number above 0",
        ),
    ],
)
def test_polysae_task_refuses_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", ["step", "evaluation"])
def test_the_planned_run_has_the_shapes_of_the_run(shape, tmp_path):
    np.save(tmp_path / "x.npy", vectors(64)["inputs"])
    config = run.default_config()
    config.data.source = str(tmp_path / "x.npy")
    config.data.update({"batch_size": 8, "eval_batch_size": 8})
    config.model.update({"d_sae": M, "k": 4.0, "ranks": (8, 4, 4), "d_in": D})
    config.train.steps = 2
    phases = [make(config).phases[0] for make in (run.build, run.outline)]
    if shape == "step":
        assert phases[0].data.batch == phases[1].data.batch
        trees = [jax.eval_shape(phase.task.init, jax.random.key(0)) for phase in phases]
        chex.assert_trees_all_equal_shapes(*trees)
    else:
        batches = [next(iter(phase.data.evaluate["eval"]())) for phase in phases]
        assert batches[0].keys() == batches[1].keys()
