import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.represent.gcr import task as classify
from subspace_jax.train import loop

from .common import (
    Breaking,
    Interrupted,
    Regression,
    arrays,
    assert_close,
    assert_same_bits,
    breaking,
    classification,
    data_of,
    make_tx,
    regression,
    run_of,
)

NUM_STEPS = 13
ROOT = pathlib.Path(__file__).parents[2]


def a_tx():
    return optax.sgd(lambda count: 0.5 / (10.0 + count.astype(jnp.float32)), momentum=0.9)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run in one go, by number of micro-batches: its final state and its rows."""

    @functools.cache
    def run(accumulate):
        workdir, (task, data) = tmp_path_factory.mktemp("whole"), regression()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "plot_curves", lambda *arguments: None)
            fields = {"num_steps": NUM_STEPS, "workdir": workdir, "accumulate": accumulate}
            result = train.fit(run_of(task, a_tx(), data, **fields))
        return result, (workdir / "metrics.jsonl").read_text()

    return run


def random_steps(seed, count):
    return sorted(int(s) for s in np.random.default_rng(seed).choice(NUM_STEPS, count, replace=False))


@pytest.mark.parametrize(
    ("at", "accumulate"),
    [
        (random_steps(0, 4)[1], 1),
        *(
            pytest.param(at, n, marks=pytest.mark.slow)
            for at in [0, *random_steps(0, 4), 12]
            for n in (1, 2)
            if (at, n) != (random_steps(0, 4)[1], 1)
        ),
    ],
)
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(at, accumulate, fit, uninterrupted, tmp_path):
    task, data = regression()
    with pytest.raises(Interrupted):
        fit(task, a_tx(), breaking(data, at), num_steps=NUM_STEPS, workdir=tmp_path, accumulate=accumulate)
    # A process that is killed leaves rows behind that are later than its last checkpoint, the last of them torn.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": at + 2, "split": "train", "loss": 7.0}) + '\n{"step": 99, "spl')
    result = fit(task, a_tx(), data, num_steps=NUM_STEPS, workdir=tmp_path, accumulate=accumulate)
    expected, rows = uninterrupted(accumulate)
    assert_same_bits(result.state, expected.state)
    assert result.metrics == expected.metrics
    assert (tmp_path / "metrics.jsonl").read_text() == rows


@pytest.mark.slow
def test_a_run_interrupted_again_and_again_ends_with_the_same_bits(fit, uninterrupted, tmp_path):
    task, data = regression()
    for at in random_steps(1, 3):
        with pytest.raises(Interrupted):
            fit(task, a_tx(), breaking(data, at), num_steps=NUM_STEPS, workdir=tmp_path)
    result = fit(task, a_tx(), data, num_steps=NUM_STEPS, workdir=tmp_path)
    assert_same_bits(result.state, uninterrupted(1)[0].state)
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted(1)[1]


@pytest.mark.slow
def test_a_finished_run_started_again_only_evaluates(fit, uninterrupted, tmp_path, caplog):
    task, data = regression()
    fit(task, a_tx(), data, num_steps=NUM_STEPS, workdir=tmp_path)
    with caplog.at_level("INFO", "subspace_jax"):
        result = fit(task, a_tx(), breaking(data, NUM_STEPS), num_steps=NUM_STEPS, workdir=tmp_path)
    assert f"Going on from step {NUM_STEPS}" in caplog.text
    assert_same_bits(result.state, uninterrupted(1)[0].state)
    assert result.metrics == uninterrupted(1)[0].metrics
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted(1)[1]


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_shorter_one_ended(fit, tmp_path):
    task, data = regression()
    tx = optax.sgd(0.05)
    fit(task, tx, data, num_steps=5, workdir=tmp_path / "parts")
    parts = fit(task, tx, data, num_steps=9, workdir=tmp_path / "parts")
    whole = fit(task, tx, data, num_steps=9, workdir=tmp_path / "whole")
    assert_same_bits(parts.state, whole.state)


@pytest.mark.slow
def test_another_seed_is_refused_unless_it_is_asked_for(fit, tmp_path):
    task, data = regression()
    begun = fit(task, a_tx(), data, num_steps=5, workdir=tmp_path, seed=3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"seed: the run in .* began with another seed than 4; .*--change-seed"):
        fit(task, a_tx(), data, num_steps=9, workdir=tmp_path, seed=4)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    changed = fit(task, a_tx(), data, num_steps=9, workdir=tmp_path, seed=4, change_seed=True)
    key = train.init_state(task, a_tx(), train.make_mesh(), seed=4).key
    assert_same_bits(changed.state.key, key)
    assert not np.array_equal(np.asarray(begun.state.key), np.asarray(key))
    # From here on it is a run with that seed.
    assert int(fit(task, a_tx(), data, num_steps=10, workdir=tmp_path, seed=4).state.step) == 10


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["the folder", "what is in it"])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_restarts_where_it_is_asked_to(lose, fit, tmp_path):
    task, data = regression()
    fit(task, a_tx(), data, num_steps=5, workdir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    if lose != "the folder":
        (tmp_path / "checkpoints").mkdir()
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileNotFoundError, match=r"workdir: the checkpoints of the run in .* are gone; .*--restart"):
        fit(task, a_tx(), data, num_steps=9, workdir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == rows
    restarted = fit(task, a_tx(), data, num_steps=9, workdir=tmp_path, restart=True)
    assert_same_bits(restarted.state, fit(task, a_tx(), data, num_steps=9, workdir=tmp_path / "other").state)
    assert (tmp_path / "earlier.1" / "metrics.jsonl").read_text() == rows


@pytest.mark.slow
def test_a_newest_checkpoint_that_is_gone_is_missed_and_the_one_before_taken(fit, tmp_path, caplog):
    task, data = regression()
    fit(task, a_tx(), data, num_steps=5, workdir=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    assert int(fit(task, a_tx(), data, num_steps=5, workdir=tmp_path).state.step) == 5
    assert f"The checkpoint of step 5 is gone from {tmp_path}; resuming from an earlier one." in caplog.text
    caplog.clear()
    fit(task, a_tx(), data, num_steps=5, workdir=tmp_path)
    (tmp_path / "newest_checkpoint.json").write_text("[]")
    fit(task, a_tx(), data, num_steps=6, workdir=tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_anew(fit, tmp_path):
    task, data = regression()
    with pytest.raises(Interrupted):
        fit(task, a_tx(), breaking(data, 3), num_steps=5, workdir=tmp_path, checkpoint_every=0)
    assert train.read_metrics(tmp_path / "metrics.jsonl")
    assert int(fit(task, a_tx(), data, num_steps=5, workdir=tmp_path).state.step) == 5


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(fit, tmp_path):
    task, data = regression()
    refused = []

    def beside():
        with pytest.raises(OSError, match="is in use by another run") as error:
            fit(task, a_tx(), data, num_steps=5, workdir=tmp_path, seed=1)
        refused.append(error)

    class Beside(Breaking):
        def __next__(self):
            if self._batches.get_state()["next_index"] == self._at:
                beside()
            return next(self._batches)

    watched = data._replace(train=lambda seed: Beside(data.train(seed), 3))
    result = fit(task, a_tx(), watched, num_steps=5, workdir=tmp_path)
    assert len(refused) == 1
    assert_same_bits(result.state, fit(task, a_tx(), data, num_steps=5, workdir=tmp_path / "alone").state)
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.eight_devices
@pytest.mark.slow
def test_class_subspaces_resume_on_another_mesh(fit, tmp_path):
    task, data = classification(features=())
    tx = make_tx(num_steps=8)
    spread, mixed = train.make_mesh(data=8), train.make_mesh(data=1, fsdp=2, tensor=4)
    with pytest.raises(Interrupted):
        fit(task, tx, breaking(data, 5), num_steps=8, workdir=tmp_path / "moved", mesh=spread)
    moved = fit(task, tx, data, num_steps=8, workdir=tmp_path / "moved", mesh=mixed)
    assert {x.data.shape for x in moved.state.params["head"]["bases"].addressable_shards} == {(2, 8, 2)}
    stayed = fit(task, tx, data, num_steps=8, workdir=tmp_path / "stayed", mesh=spread)
    assert_close(moved.state, stayed.state, atol=1e-5)
    rows = [train.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("moved", "stayed")]
    assert [(row["step"], row["split"]) for row in rows[0]] == [(row["step"], row["split"]) for row in rows[1]]


@pytest.mark.eight_devices
def test_what_is_restored_on_another_mesh_is_what_was_saved(tmp_path):
    task, _ = classification()
    tx = make_tx(grassmann="riemannian_adam")
    saved = train.init_state(task, tx, train.make_mesh(data=8), seed=5)
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(saved)
    checkpoints.wait()
    expected = train.state_shardings(task, tx, train.make_mesh(data=1, fsdp=2, tensor=4))
    restored, _ = checkpoints.restore(lambda record: expected)
    checkpoints.close()
    assert_same_bits(restored, saved)


@pytest.mark.slow
def test_a_user_iterator_of_grain_resumes_in_the_middle_of_an_epoch(fit, tmp_path):
    rows = arrays(48)
    made = data_of(rows, rows)

    def batches(seed):
        records = [{name: values[i] for name, values in rows.items()} for i in range(48)]
        return iter(grain.MapDataset.source(records).shuffle(seed).repeat().to_iter_dataset().batch(16))

    data = made._replace(train=batches)
    task, tx = Regression(), optax.sgd(0.05)
    fit(task, tx, data, num_steps=4, workdir=tmp_path / "parts")
    parts = fit(task, tx, data, num_steps=8, workdir=tmp_path / "parts")
    whole = fit(task, tx, data, num_steps=8, workdir=tmp_path / "whole")
    assert_same_bits(parts.state, whole.state)


CONFIG = """
from subspace_jax.represent.gcr import task as classify

def get_config():
    config = classify.default_config()
    config.data.name = "union_of_subspaces"
    config.data.batch_size = 64
    config.model.features = (16,)
    config.model.dims = (2,)
    config.mesh.tensor = 2
    config.train.steps = 60
    config.train.log_every = 1
    config.train.eval_every = 20
    config.train.checkpoint_every = 10
    return config
"""


def start(config, workdir):
    command = [sys.executable, "-m", "subspace_jax.cli.main", "train", "--quiet"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    return subprocess.Popen(
        [*command, "--config", str(config), "--workdir", str(workdir)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_process_killed_with_sigkill_resumes_to_the_bits_of_one_that_was_not(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    killed = start(config, tmp_path / "killed")
    at, deadline = int(np.random.default_rng(2).integers(12, 40)), time.monotonic() + 120
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while max((row["step"] for row in train.read_metrics(metrics)), default=0) < at:
        assert killed.poll() is None, killed.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert max(row["step"] for row in train.read_metrics(metrics)) < 60
    again, whole = start(config, tmp_path / "killed"), start(config, tmp_path / "whole")
    printed = [process.communicate(timeout=120)[0] for process in (again, whole)]
    assert (again.returncode, whole.returncode) == (0, 0), "\n".join(printed)
    assert "Going on from step" in printed[0]
    resumed, expected = (train.restore(tmp_path / name).state for name in ("killed", "whole"))
    assert int(resumed.step) == 60
    assert_same_bits(resumed, expected)
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_evaluating_a_run_leaves_the_checkpoint_alone_that_it_is_writing(tmp_path):
    config = classify.default_config()
    settings = ["data.name=union_of_subspaces", "model.features=()", "model.dims=(2,)", "train.steps=2"]
    config = train.override(config, settings)
    train.run(config, tmp_path, progress=False)
    writing = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    writing.mkdir()
    assert train.evaluate_run(tmp_path)[0] == 2
    assert writing.is_dir()
