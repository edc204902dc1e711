"""Causal language modelling as a task: losses, chunks, meshes, checkpoints to start from, and runs from configs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import data, interop, language, nn, train
from subspace_jax.data import text

CONFIG = nn.CausalLMConfig.gpt2(259, 32, 2, 2, max_length=64)
TOKENIZER = text.ByteTokenizer()


@pytest.fixture(scope="module")
def rows():
    texts = [text.Completion("p", "the quick brown fox " * (1 + i % 4)) for i in range(40)]
    return text.pack_rows(texts, TOKENIZER, 32)


@pytest.fixture(scope="module")
def batch(rows):
    return {name: jnp.asarray(x) for name, x in next(data.eval_batches(rows, batch_size=8)).items()}


def task(**options):
    return language.CausalLMTask(CONFIG, **options)


evaluate = jax.jit(task().evaluate)


def test_loss_is_the_mean_over_weighted_tokens(batch):
    params, _ = task().init(jax.random.key(0))
    loss, (_, metrics) = jax.jit(task().loss)(params, {}, batch, key=None, step=0)
    options = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
    logits = jax.jit(lambda p, x: nn.causal_lm_apply(CONFIG, p, x, **options).logits)(params, batch["inputs"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    np.testing.assert_allclose(loss, jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"]), rtol=1e-5)
    sums = evaluate(params, {}, batch, key=None)
    np.testing.assert_allclose(sums["loss"] / sums["count"], loss, rtol=1e-5)
    assert 0 <= metrics["accuracy"] <= 1


def test_evaluate_counts_no_padding(batch):
    params, _ = task().init(jax.random.key(0))
    half = dict(batch, mask=batch["mask"].at[4:].set(0))
    few = {name: x[:4] for name, x in batch.items()}
    got, want = (evaluate(params, {}, b, key=None) for b in (half, few))
    chex.assert_trees_all_close(got, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": "dots", "loss_chunk": 16}, {"loss_chunk": 8}, {"remat": "full"}])
def test_chunks_and_remat_change_no_gradient(batch, options):
    params, _ = task().init(jax.random.key(0))
    grads = [
        jax.jit(jax.grad(lambda p, t=t: t.loss(p, {}, batch, key=None, step=0)[0]))(params)
        for t in (task(), task(**options))
    ]
    chex.assert_trees_all_close(*grads, rtol=0, atol=2e-6)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 1, 1), (1, 8, 1)))]
)
def test_a_step_of_causal_lm_task_on_a_mesh_is_that_of_one_device(batch, sizes):
    # Plain SGD: the update is the gradient, where Adam's would be the sign of what rounding leaves of a zero one.
    tx = optax.sgd(0.1)
    results = []
    for mesh in (train.make_mesh(devices=jax.devices()[:1]), train.make_mesh(*sizes)):
        own = task()
        state = train.init_state(own, tx, mesh)
        placed = {name: jax.device_put(x, train.batch_sharding(mesh)) for name, x in batch.items()}
        state, metrics = train.jit_train_step(own, tx, mesh)(state, placed)
        results.append((jax.device_get(state.params), float(metrics["loss"])))
    (one, loss), (many, loss_many) = results
    assert abs(loss - loss_many) < 1e-5
    chex.assert_trees_all_close(many, one, rtol=0, atol=1e-5)


@pytest.mark.eight_devices
def test_causal_lm_task_gathers_layers_one_by_one(batch):
    mesh, tx = train.make_mesh(1, 8, 1), optax.sgd(0.1)
    own = task(remat="full")
    abstract, _ = train.state_shardings(own, tx, mesh)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    text = train.jit_train_step(own, tx, mesh).lower(abstract, shapes).compile().as_text()
    # The up kernels of both layers, whole, would be [2, 32, 128].
    assert "all-gather" in text
    assert "f32[2,32,128]" not in text


@pytest.mark.eight_devices
def test_a_run_starts_from_a_checkpoint_folder_on_any_mesh(batch, tmp_path):
    params, _ = task().init(jax.random.key(3))
    interop.save_causal_lm(tmp_path / "model", CONFIG, params)
    for mesh in (train.make_mesh(devices=jax.devices()[:1]), train.make_mesh(2, 2, 2)):
        state = train.init_state(task(folder=tmp_path / "model"), optax.adam(1e-3), mesh)
        chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(params))


def test_option_scores_do_not_depend_on_the_batches():
    questions = [text.Choice(f"{i} + {i} =", [str(2 * i), "none", "no"], 0) for i in range(5)]
    rows = text.choice_rows(questions, TOKENIZER, 32)
    params, _ = task().init(jax.random.key(0))
    own, mesh = task(), train.make_mesh(devices=jax.devices()[:1])
    found = [language.option_scores(own, params, data.eval_batches(rows, batch_size=n), mesh) for n in (4, 15)]
    chex.assert_trees_all_close(*found, rtol=1e-5)
    nll, tokens = found[0]
    assert nll.shape == tokens.shape == (15,)
    for row in (0, 7):
        question = questions[row // 3]
        one = text.pad_rows([text.Completion(question.prompt, question.options[row % 3])], TOKENIZER, 32)
        sums = evaluate(params, {}, {name: jnp.asarray(x) for name, x in one.items()} | {"mask": jnp.ones(1)}, key=None)
        np.testing.assert_allclose([nll[row], tokens[row]], [sums["loss"], sums["count"]], rtol=1e-5)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "train.txt").write_text("\n\n".join(f"the sum of {i} and {i} is {2 * i}." for i in range(200)))
    (tmp_path / "eval.txt").write_text("\n\n".join(f"the sum of {i} and {i} is {2 * i}." for i in range(200, 220)))
    config = language.default_config().unlock()
    config.data.source, config.data.evaluation = str(tmp_path / "train.txt"), str(tmp_path / "eval.txt")
    config.data.length, config.data.batch_size, config.data.eval_batch_size = 32, 8, 8
    config.train.log_every = 10
    return config.lock()


@pytest.mark.slow
@pytest.mark.parametrize(("length", "steps", "rate"), [(32, 15, 1e-2), (64, 30, 3e-3)])
@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
def test_a_run_learns_and_is_written_as_a_folder(config, tmp_path, monkeypatch, length, steps, rate):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    settings = [f"data.length={length}", f"train.steps={steps}", f"optim.learning_rate={rate}"]
    after = train.run(train.override(config, settings), tmp_path / "b", progress=False)
    assert after.metrics["loss"] < 0.7 * np.log(259)  # that of equal probabilities
    language.export(tmp_path / "b", tmp_path / "model")
    model, params = interop.load_causal_lm(tmp_path / "model")
    assert model.vocab_size == 259
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(after.state.params))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["model.size=huge"], ValueError, "model.size: expected one of"),
        (["data.length=512"], ValueError, "data.length: 512 positions in a sequence, the model has 256"),
        (["data.evaluation="], ValueError, "data.evaluation: expected a second file"),
        (["data.eval_rows=-1"], ValueError, "data.eval_rows: expected at least 0, got -1"),
        (["data.source=none.jsonl"], FileNotFoundError, r"no file none\.jsonl"),
        (["data.source=no_such_set"], ValueError, "no file 'no_such_set', and no set with that name"),
        (["data.batch_size=100000"], ValueError, "batch_size: expected at most"),
        (["model.tokenizer=none"], FileNotFoundError, "tokenizer: no file"),
        (["model.folder=none", "model.tokenizer=bytes"], FileNotFoundError, "none"),
    ],
)
def test_what_can_t_serve_is_refused_before_anything_is_written(config, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train.run(train.override(config, settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_build_evaluates_evenly_spaced_rows_of_a_set(config):
    def rows_of(wanted):
        (phase,) = train.build(train.override(config, [f"data.eval_rows={wanted}"])).phases
        batches = list(phase.data.evaluate["eval"]())
        return np.concatenate([batch["inputs"][batch["mask"] > 0] for batch in batches])

    every = rows_of(0)
    count = len(every)
    assert count > 5
    np.testing.assert_array_equal(rows_of(5), every[[count * i // 5 for i in range(5)]])
    np.testing.assert_array_equal(rows_of(count + 1), every)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(config, tmp_path):
    small = nn.CausalLMConfig.gpt2(200, 32, 1, 2, max_length=64)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.param_shapes(small))
    interop.save_causal_lm(tmp_path / "model", small, zeros)
    with pytest.raises(ValueError, match="it has 259 tokens, the model has rows for 200"):
        train.build(train.override(config, [f"model.folder={tmp_path / 'model'}", "model.tokenizer=bytes"]))


@pytest.mark.slow
def test_unstacked_layers_take_the_same_steps_and_are_saved_as_stacks_are(batch, tmp_path):
    params, _ = task().init(jax.random.key(3))
    interop.save_causal_lm(tmp_path / "start", CONFIG, params)
    mesh, tx, folders = train.make_mesh(devices=jax.devices()[:1]), optax.adamw(1e-3), []
    for stacked in (True, False):
        own = task(folder=tmp_path / "start", stacked=stacked)
        with jax.numpy_dtype_promotion("standard"):
            state, step = train.init_state(own, tx, mesh), train.jit_train_step(own, tx, mesh)
            assert isinstance(state.params["layers"], tuple) != stacked
            for _ in range(2):
                state, _ = step(state, train.to_device(batch, train.batch_sharding(mesh)))
        folders.append(tmp_path / str(stacked))
        interop.save_causal_lm(folders[-1], CONFIG, state.params)
    (_, expected), (_, got) = (interop.load_causal_lm(folder) for folder in folders)
    # Adam divides by the size of a gradient, and of a small one rounding leaves little: a tenth of two steps.
    chex.assert_trees_all_close(got, expected, rtol=0, atol=2e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), nn.unstack_layers(params), state.params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_unstacked_layers_are_refused_with_adapters():
    config = language.finetune.default_config()
    config.adapter.method, config.model.stacked = "lora", False
    with pytest.raises(ValueError, match=r"model\.stacked"):
        language.finetune.outline(config)
