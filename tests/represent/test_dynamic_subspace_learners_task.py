"""Dynamic subspace learners as a task: the contract, what happens between epochs, runs that are interrupted."""

import dataclasses
import functools
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import data, train
from subspace_jax.cli import main as cli
from subspace_jax.represent import dynamic_subspace_learners as learners
from subspace_jax.represent.dynamic_subspace_learners import task as learning
from subspace_jax.train.host import run_on_host

from ..train.common import Interrupted, assert_same_bits
from ..train.task_battery import StopAt, TaskContract, one_device

ROOT = pathlib.Path(__file__).parents[2]
NUM_EXAMPLES, EPOCH_STEPS = 64, 4
MARGIN = {"per_class": 4, "beta": 1.2, "margin": 0.2, "cutoff": 0.5}


def examples(seed=0, num=NUM_EXAMPLES):
    rng = np.random.default_rng(seed)
    labels = (np.arange(num) % 4).astype(np.int32)
    x = 2 * np.eye(4, 8)[labels] + rng.standard_normal((num, 8))
    return {"inputs": x.astype(np.float32), "labels": labels, "index": np.arange(num, dtype=np.int32)}


def task_of(count=1, **schedule):
    network = learners.NetworkConfig(features=(16,), embedding=16, learners=count, max_learners=3, dropout=0.0)
    make = functools.partial(learners.make_learners, input_shape=(8,), config=network)
    return learners.SubspaceLearnersTask(make, NUM_EXAMPLES, learners.Schedule(EPOCH_STEPS, **schedule), MARGIN)


PASSES = {"train": data.eval_passes(examples(), 32), "eval": data.eval_passes(examples(1, 40), 32)}


def data_of(assignment):
    batches = functools.partial(
        learners.class_balanced_batches, examples(), np.asarray(assignment), batch_size=16, per_class=4
    )
    shapes = {**train.batch_shapes(examples(), 16), "cluster": jax.ShapeDtypeStruct((16,), jnp.int32)}
    return train.DataSpec(shapes, lambda seed: batches(seed=seed), PASSES, EPOCH_STEPS)


@pytest.mark.slow
class TestSubspaceLearners(TaskContract):
    def make(self):
        return task_of(2), data_of(np.arange(NUM_EXAMPLES) // 32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No picture, which takes longer than a run; Optax raises float32 to int32 powers."""
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    with jax.numpy_dtype_promotion("standard"):
        yield


TX = optax.adam(1e-2)


@functools.cache
def fresh(count):
    return train.init_state(task_of(count), TX, one_device())


def started(count=1, epochs=0, **variables):
    """The state of a run after some epochs, with moments that are not 0."""
    state = fresh(count)
    adam, *rest = state.opt_state
    moments = {name: jax.tree.map(jnp.ones_like, getattr(adam, name)) for name in ("mu", "nu")}
    return dataclasses.replace(
        state,
        step=jnp.int32(epochs * EPOCH_STEPS),
        opt_state=(adam._replace(**moments), *rest),
        variables={**state.variables, **variables},
    )


def at(nmi=0.5, features=None):
    rows = [{"phase": "train", "step": 4, "split": "eval", "nmi": nmi}]
    return train.At(rows, jax.random.key(7), lambda name: {"features": features}, run_on_host)


# The last 10 of 16 neurons matter, in this order.
SCORES = learners.ScoreState(jnp.where(jnp.arange(16) < 6, 0.0, jnp.arange(16.0) + 20), jnp.int32(16))
STALLED = learners.PlateauState(jnp.float32(0.9), jnp.int32(1), jnp.ones((), bool))


def clustered():
    """Features in two directions, and their clusters."""
    cluster = (np.arange(NUM_EXAMPLES) % 3 == 0).astype(np.int32)
    return np.eye(2, 16, dtype=np.float32)[cluster] + 0.01, cluster


def test_refresh_splits_the_newest_learner_and_clusters_the_examples_where_nmi_has_stalled():
    task = task_of(patience=3)
    state = started(1, 5, scores=SCORES, plateau=STALLED)
    features, cluster = clustered()
    new = task.refresh(state, at(features=features))
    learner_id = np.asarray(new.variables["model"]["embedding"]["learner_id"])
    np.testing.assert_array_equal(learner_id, np.repeat([0, 1], [10, 6]))
    best_first = np.arange(15, 5, -1)
    np.testing.assert_array_equal(
        new.params["embedding"]["kernel"][:, :10], state.params["embedding"]["kernel"][:, best_first]
    )
    chex.assert_trees_all_equal(new.params["backbone"], state.params["backbone"])
    for moments in (new.opt_state[0].mu, new.opt_state[0].nu):
        assert all(not np.any(x) for x in moments["embedding"].values())
        chex.assert_trees_all_equal(moments["backbone"], jax.tree.map(jnp.ones_like, moments["backbone"]))
    # Cluster 1 is the smaller one: all were in cluster 0 before.
    np.testing.assert_array_equal(new.variables["assignment"], cluster)
    assert not new.variables["plateau"].explore
    chex.assert_trees_all_equal(new.variables["scores"], learners.init_scores(16))


@pytest.mark.parametrize(
    ("change", "epochs", "nmi"),
    [({"patience": 5}, 5, 0.5), ({"dynamic": False}, 5, 0.5), ({"finetune_epoch": 4}, 5, 0.5), ({}, 5, 0.95)],
    ids=["patience", "fixed", "finetune", "best"],
)
def test_refresh_leaves_parameters_and_moments_as_they_are_where_no_split_is_due(change, epochs, nmi):
    task = task_of(**{"patience": 3, **change})
    state = started(1, epochs, scores=SCORES, plateau=STALLED)
    new = task.refresh(state, at(nmi))
    chex.assert_trees_all_equal((new.params, new.opt_state), (state.params, state.opt_state))
    chex.assert_trees_all_equal(new.variables["assignment"], state.variables["assignment"])
    assert bool(new.variables["plateau"].explore)
    assert bool(new.variables["finetune"]) == ("finetune_epoch" in change)


def test_refresh_keeps_moments_where_it_is_told_to():
    task = task_of(patience=3, reset_moments=False)
    state = started(1, 5, scores=SCORES, plateau=STALLED)
    new = task.refresh(state, at(features=clustered()[0]))
    assert int(jnp.max(new.variables["model"]["embedding"]["learner_id"])) == 1
    chex.assert_trees_all_equal(new.opt_state, state.opt_state)


def test_refresh_clusters_anew_every_few_epochs():
    task = task_of(2, recluster_epochs=3, dynamic=False)
    features, cluster = clustered()
    for epochs, wanted in ((0, True), (1, False), (2, False), (3, True)):
        new = task.refresh(started(2, epochs), at(features=features))
        assert np.array_equal(new.variables["assignment"], cluster) == wanted


def test_a_split_needs_no_other_program():
    task = task_of(patience=3)
    step = train.jit_train_step(task, TX, one_device())
    shardings = train.state_shardings(task, TX, one_device())[1]

    def take(state):
        batch = next(data_of(state.variables["assignment"]).train(0))
        placed = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
        return step(placed, train.to_device(batch, train.batch_sharding(one_device())))

    state = started(1, 5, scores=SCORES, plateau=STALLED)
    _, before = take(state)
    new, after = take(task.refresh(state, at(features=clustered()[0])))
    assert (before["learners"], after["learners"]) == (1, 2)
    assert step._cache_size() == 1
    assert int(new.variables["scores"].count) == 16


@functools.cache
def gradients():
    """A task of two learners, its arrays and a batch, and its compiled gradients."""
    task = task_of(2)
    params, variables = jax.jit(task.init)(jax.random.key(0))
    batch = next(data_of(np.arange(NUM_EXAMPLES) % 2).train(0))
    return task, params, variables, batch, jax.jit(functools.partial(task.gradients, key=None, step=0))


def test_scores_sum_activations_times_the_gradient_by_them():
    task, params, variables, batch, gradient = gradients()
    (loss, (new, _)), _ = gradient(params, variables, batch)

    @jax.value_and_grad
    def with_gain(gain):
        a = task.embed(params, variables, batch["inputs"]).embedding
        return task._loss_of(params, variables, a * (gain - 1)[None], batch=batch, key=None)[0]

    # The derivative by a factor of a neuron is the sum over examples of activation times gradient.
    same, wanted = jax.jit(with_gain)(jnp.ones(16))
    np.testing.assert_allclose(new["scores"].sum_ag, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    own = np.asarray(variables["model"]["embedding"]["learner_id"]) == batch["cluster"][0]
    assert np.all(new["scores"].sum_ag[~own] == 0)
    assert np.any(new["scores"].sum_ag[own] != 0)


def test_finetuning_trains_all_learners_from_one_batch():
    _, params, variables, batch, gradient = gradients()
    moved = []
    for finetune in (False, True):
        _, found = gradient(params, {**variables, "finetune": jnp.asarray(finetune)}, batch)
        moved.append(np.any(np.asarray(found["embedding"]["kernel"]) != 0, axis=0))
    own = np.asarray(variables["model"]["embedding"]["learner_id"]) == batch["cluster"][0]
    np.testing.assert_array_equal(moved, [own, np.ones(16, bool)])


@pytest.mark.slow
def test_gradients_of_an_entry_are_its_part_of_all():
    task, params, variables, batch, gradient = gradients()
    of_entry = jax.jit(functools.partial(task.gradients, key=None, step=0, wrt="embedding"))
    got, whole = of_entry(params, variables, batch)[1], gradient(params, variables, batch)[1]["embedding"]
    chex.assert_trees_all_close(got, whole, rtol=1e-5, atol=1e-7)


def phase_of(task, epochs):
    def of_state(state):
        return data_of(state.variables["assignment"])

    return train.Phase("train", task, of_state, epochs * EPOCH_STEPS, TX, round_steps=EPOCH_STEPS, refresh=task.refresh)


@pytest.mark.slow
def test_a_run_with_clusters_that_is_interrupted_ends_with_the_same_bits(tmp_path):
    phase = phase_of(task_of(2, dynamic=False), 3)

    def fit(name, *hooks):
        options = {"log_every": 2, "eval_every": 0, "checkpoint_every": 4, "best": "", "progress": False}
        return train.fit(train.Run((phase,), workdir=tmp_path / name, **options), hooks)

    whole = fit("whole")
    assert len(np.unique(whole.state.variables["assignment"])) == 2
    with pytest.raises(Interrupted):
        fit("interrupted", StopAt(10))  # in the third epoch, with a checkpoint from the end of the second
    resumed = fit("interrupted")
    assert_same_bits(jax.device_get(resumed.state), jax.device_get(whole.state))
    assert resumed.rows == whole.rows


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.name", "digit", r"data\.name: expected one of .*did you mean 'digits'"),
        ("data.validation", 1.0, r"data\.validation: expected a number in \[0, 1\)"),
        ("data.per_class", 1, "per_class: expected at least 2"),
        ("data.batch_size", 33, "batch_size: expected a multiple of per_class = 8"),
        ("data.batch_size", 4096, r"data\.batch_size: expected at most the \d+ examples"),
        ("learners.patience", 0, r"learners\.patience: expected at least 1, got 0"),
        ("learners.recluster_epochs", 0, r"learners\.recluster_epochs: expected at least 1"),
        ("learners.finetune_epoch", 0, r"learners\.finetune_epoch: expected at least 1"),
        ("margin.cutoff", 0.0, r"margin\.cutoff: expected a finite number above 0"),
        ("model.embedding", 5, "expected an embedding of at least 6 neurons, got 5"),
    ],
)
def test_a_config_with_a_wrong_field_is_refused_before_it_runs(field, value, message):
    config = learning.default_config()
    config.data.name = "shape_texture"
    group, name = field.split(".")
    config[group][name] = value
    with pytest.raises(ValueError, match=message):
        learning.build(config)


def digits_run(**fields):
    config = train.load_config("represent/digits_learners:dynamic")
    for name, value in fields.items():
        config.learners[name] = value
    return train.build(config)


@pytest.mark.slow
def test_attention_draws_the_maps_of_a_run_and_refuses_one_without(tmp_path, capsys):
    shapes, digits = ["--config", "represent/shape_texture"], ["--config", "represent/digits_learners"]
    for name, config in (("shapes", shapes), ("digits", digits)):
        assert cli.main(["train", *config, "--workdir", str(tmp_path / name), "--config.train.steps=3"]) == 0
    assert cli.main(["attention", "--workdir", str(tmp_path / "shapes"), "--images", "3"]) == 0
    assert (tmp_path / "shapes" / "attention.png").read_bytes().startswith(b"\x89PNG")
    for name, message in (("digits", "expected a network with attention"), ("none", "holds no run")):
        assert cli.main(["attention", "--workdir", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["attention", "--workdir", str(tmp_path / "shapes"), "--images", "0"]) == 2
    assert "num_images: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_learners_of_digits_are_split_and_reach_recall_and_nmi(tmp_path):
    result = train.fit(dataclasses.replace(digits_run(), workdir=tmp_path, progress=False))
    assert result.metrics["recall_at_1"] >= 0.96
    assert result.metrics["nmi"] >= 0.88
    assert result.metrics["learners/several"] == 1
    assert int(result.state.skipped) == 0


@pytest.mark.slow
def test_a_run_that_is_interrupted_before_and_after_a_split_ends_with_the_same_bits(tmp_path):
    run = digits_run(patience=1, finetune_epoch=8)
    (phase,) = run.phases
    phase = phase._replace(num_steps=10 * phase.round_steps)

    def fit(name, *hooks):
        options = {"workdir": tmp_path / name, "checkpoint_every": 20, "progress": False}
        return train.fit(dataclasses.replace(run, phases=(phase,), **options), hooks)

    whole = fit("whole")
    counts = [row["count"] for row in whole.rows if row["split"] == "learners"]
    assert counts[-1] > 1
    split = counts.index(2) * phase.round_steps
    for step in (split - 5, split, split + 5, len(counts) * phase.round_steps - 3):
        with pytest.raises(Interrupted):
            fit("interrupted", StopAt(step))
    resumed = fit("interrupted")
    assert_same_bits(jax.device_get(resumed.state), jax.device_get(whole.state))
    assert resumed.rows == whole.rows


@pytest.mark.slow
@pytest.mark.eight_devices
def test_learners_are_split_on_a_mesh_too(tmp_path):
    run = digits_run(patience=1)
    (phase,) = run.phases
    mesh = train.make_mesh(2, 2, 2)
    phase = phase._replace(num_steps=10 * phase.round_steps)
    result = train.fit(dataclasses.replace(run, phases=(phase,), workdir=tmp_path, mesh=mesh, progress=False))
    assert result.metrics["learners/several"] == 1
    assert result.metrics["recall_at_1"] >= 0.95


@pytest.mark.slow
def test_two_processes_split_learners_and_cluster_examples_alike(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.represent.worker"]
    processes = [
        subprocess.Popen(
            [*command, str(index), port, str(tmp_path / f"{index}.npz"), str(tmp_path / "run")],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    one, two = (dict(np.load(tmp_path / f"{index}.npz")) for index in range(2))
    chex.assert_trees_all_equal(one, two)
    assert one["learner_id"].max() > 0
    assert len(np.unique(one["assignment"])) == one["learner_id"].max() + 1
    assert one["recall"] >= 0.95
