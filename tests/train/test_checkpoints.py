import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from subspace_jax import train
from subspace_jax.train import digests, reading

from ..variants import rest_slow
from .common import Interrupted, Regression, assert_same_bits, breaking, regression, run_of

# The reader of Orbax leaves tasks behind when a file turns out to be damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TX = optax.sgd(0.05, momentum=0.9)


@pytest.fixture(scope="module")
def states():
    """The states after 0, 1, 2, ... steps, on the host."""
    task, data = regression()
    mesh = train.make_mesh()
    state, step, batches = train.init_state(task, TX, mesh), train.jit_train_step(task, TX, mesh), data.train(0)
    made = [jax.tree.map(np.array, state)]
    for _ in range(8):
        state, _ = step(state, train.to_device(next(batches), train.batch_sharding(mesh)))
        made.append(jax.tree.map(np.array, state))
    return made


def expected(task=None, tx=TX):
    found = train.state_shardings(task or Regression(), tx, train.make_mesh())
    return lambda record: found


def restored(checkpoints, **options):
    """The state that is restored."""
    found = checkpoints.restore(expected(), **options)
    return None if found is None else found[0]


def record_of(batches):
    return train.Record(data=batches.get_state())


def at_position(batches):
    return lambda state, record: batches.set_state(record.data)


def save(folder, states, metrics, **options):
    checkpoints = train.Checkpoints(folder, **options)
    for step, values in metrics.items():
        checkpoints.save(states[step], metrics=values)
    checkpoints.close()
    return train.Checkpoints(folder, **options)


def test_the_latest_and_the_best_stay(states, tmp_path):
    scores = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4]
    metrics = {step: {"accuracy": score, "loss": 1 - score} for step, score in enumerate(scores)}
    best = save(tmp_path / "max", states, metrics, keep=2, best="max:accuracy")
    assert (best.steps(), best.best_step()) == ([1, 4, 5], 1)
    best = save(tmp_path / "min", states, metrics, keep=1, best="min:loss")
    assert (best.steps(), best.best_step()) == ([1, 5], 1)
    worst = save(tmp_path / "worst", states, metrics, keep=3, best="min:accuracy")
    assert (worst.steps(), worst.best_step()) == ([0, 3, 4, 5], 0)


def test_a_checkpoint_that_was_not_evaluated_or_gave_no_number_is_never_the_best(states, tmp_path):
    metrics = {0: {"loss": np.nan}, 1: None, 2: {"loss": 2.0}, 3: {"loss": np.nan}, 4: None, 5: None}
    checkpoints = save(tmp_path, states, metrics, keep=1, best="min:loss")
    assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 5], 2)
    # Nor are such ones kept by a manager that found them on disk.
    checkpoints.save(states[6], metrics={"loss": 1.0})
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.best_step()) == ([6], 6)


def test_there_is_no_best_where_none_was_evaluated(states, tmp_path):
    assert save(tmp_path, states, {0: None, 1: None}).best_step() is None


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    task, data = regression()
    mesh = train.make_mesh()
    step, batches, place = train.jit_train_step(task, TX, mesh), data.train(0), train.batch_sharding(mesh)
    state, _ = step(train.init_state(task, TX, mesh), train.to_device(next(batches), place))
    before = jax.tree.map(np.array, state)
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(state)
    for _ in range(10):
        state, _ = step(state, train.to_device(next(batches), place))
    checkpoints.wait()
    found = restored(checkpoints, step=1)
    checkpoints.close()
    assert_same_bits(found, before)


def test_what_a_kill_leaves_behind_is_no_checkpoint_and_is_removed(states, tmp_path):
    save(tmp_path, states, {1: None, 2: None}).close()
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    checkpoints = train.Checkpoints(tmp_path)
    assert checkpoints.steps() == [1, 2]
    assert_same_bits(restored(checkpoints), states[2])
    checkpoints.save(states[3])
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_reading_only_changes_nothing(states, tmp_path):
    save(tmp_path, states, {1: None, 2: None}).close()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    checkpoints = train.Checkpoints(tmp_path, keep=1, read_only=True)
    assert_same_bits(restored(checkpoints), states[2])
    checkpoints.close()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def truncate_arrays(folder):
    files = [path for path in (folder / "state").rglob("*") if path.is_file() and "/d/" in str(path)]
    assert files
    for path in files:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)


def delete_metadata(folder):
    (folder / "state" / "_METADATA").unlink()


def truncate_metadata(folder):
    path = folder / "state" / "_METADATA"
    path.write_text(path.read_text()[:100])


def delete_manifests(folder):
    for path in (folder / "state").rglob("manifest.ocdbt"):
        path.unlink()


def lose_the_position(folder):
    shutil.rmtree(folder / "run")


DAMAGES = [truncate_arrays, delete_metadata, truncate_metadata, delete_manifests, lose_the_position]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    task, data = regression()
    folder = tmp_path_factory.mktemp("whole")
    result = train.fit(run_of(task, TX, data, num_steps=12, workdir=folder, eval_every=0))
    return result, (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("damage", rest_slow(DAMAGES))
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(damage, fit, whole, tmp_path, caplog):
    task, data = regression()
    options = {"num_steps": 12, "workdir": tmp_path, "eval_every": 0}
    with pytest.raises(Interrupted):
        fit(task, TX, breaking(data, 6), **options)
    damage(tmp_path / "checkpoints" / "6")
    with caplog.at_level("INFO", "subspace_jax"):
        result = fit(task, TX, data, **options)
    assert "The checkpoint of step 6" in caplog.text
    assert "is damaged" in caplog.text
    assert "trying the one before" in caplog.text
    assert "Going on from step 4" in caplog.text
    assert_same_bits(result.state, whole[0].state)
    assert (tmp_path / "metrics.jsonl").read_text() == whole[1]
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps()[-2:] == [10, 12]
    checkpoints.close()


def test_all_damaged_is_an_error_and_nothing_is_deleted(states, tmp_path):
    checkpoints = save(tmp_path, states, {1: None, 2: None})
    for step in "12":
        truncate_arrays(tmp_path / step)
    with pytest.raises(FileNotFoundError, match=r"none of the checkpoints \[1, 2\] in .* can be read"):
        restored(checkpoints)
    with pytest.raises(FileNotFoundError, match=r"checkpoint of step 2 in .* is damaged"):
        restored(checkpoints, step=2)
    assert checkpoints.steps() == [1, 2]


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


# Orbax writes these after the digests; nothing is read from them.
LATE = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.fixture
def two(states, tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    save(tmp_path, states, {1: {"loss": 1.0}, 2: {"loss": 0.5}}).close()
    return tmp_path


def test_restore_notices_a_flipped_bit_in_any_file_of_a_checkpoint(states, two, caplog):
    files, rng = files_of(two / "2"), np.random.default_rng(0)
    assert len([path for path in files if path.parent.name == "d"]) > 3
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        checkpoints = train.Checkpoints(two, read_only=True)
        caplog.clear()
        expected_step = 2 if path.name in LATE and path.parent == two / "2" else 1
        assert_same_bits(restored(checkpoints), states[expected_step])
        assert ("is damaged" in caplog.text) == (expected_step == 1)
        if expected_step == 1:
            with pytest.raises(FileNotFoundError, match=r"checkpoint of step 2 in .* is damaged"):
                restored(checkpoints, step=2)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["state/_METADATA", "metrics/metrics", "run/metadata", "digests.json"])
@pytest.mark.parametrize(
    "content",
    rest_slow(["null", "[" * 5000, "", "[]", '{"loss": null}', '{"loss": "a"}', '{"next_index": 1}']),
)
def test_restore_passes_over_a_checkpoint_with_other_json(name, content, two, states, caplog):
    _, data = regression()
    checkpoints, batches = train.Checkpoints(two), data.train(0)
    checkpoints.save(states[3], record_of(batches), {"loss": 0.1})
    checkpoints.close()
    (two / "3" / name).write_text(content)
    checkpoints = train.Checkpoints(two)
    assert checkpoints.best_step() == (3 if name in ("state/_METADATA", "run/metadata") else 2)
    assert_same_bits(restored(checkpoints), states[2])
    assert str(two / "3" / name) in caplog.text


def test_restore_tells_whole_checkpoints_that_changed_places(two):
    (two / "2").rename(two / "3")
    (two / "1").rename(two / "2")
    with pytest.raises(FileNotFoundError, match=r"step 3 in .* is damaged \(it holds the state of step 2"):
        restored(train.Checkpoints(two, read_only=True), step=3)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("where", rest_slow(["arrays", "digests"]))
def test_restore_tries_a_read_that_failed_again_and_then_stops(where, number, two, states, monkeypatch):
    owner, name = (ocp.StandardCheckpointHandler, "restore") if where == "arrays" else (digests.hashlib, "file_digest")
    read, failures = getattr(owner, name), []

    def flaky(*args, **kwargs):
        if len(failures) < flaky.times:
            failures.append(1)
            raise OSError(number, os.strerror(number))
        return read(*args, **kwargs)

    monkeypatch.setattr(owner, name, flaky)
    monkeypatch.setattr(reading, "_PAUSES", (0.0, 0.0))
    before = {path: path.stat().st_mtime_ns for path in files_of(two)}
    flaky.times = 1
    assert_same_bits(restored(train.Checkpoints(two)), states[2])
    assert failures
    flaky.times = 1000
    with pytest.raises(OSError, match=f"can't read the checkpoint of step 2 in .*{os.strerror(number)}"):
        restored(train.Checkpoints(two))
    assert {path: path.stat().st_mtime_ns for path in files_of(two)} == before


def test_remove_after_renames_what_is_damaged(two, states, caplog):
    for number in range(2):
        content = sorted(path.read_bytes() for path in files_of(two / "2"))
        checkpoints = train.Checkpoints(two, keep=3)
        checkpoints.remove_after(1)
        aside = two / ("2.damaged" if number == 0 else "2.damaged.2")
        assert str(aside) in caplog.text
        assert sorted(path.read_bytes() for path in files_of(aside)) == content
        assert checkpoints.steps() == [1]
        checkpoints.save(states[2])
        checkpoints.close()
    assert train.Checkpoints(two, read_only=True).steps() == [1, 2]


def test_a_checkpoint_without_digests_is_read_and_its_damage_found_by_the_readers(two, states, caplog):
    for step in "12":
        (two / step / "digests.json").unlink()
    with caplog.at_level("INFO", "subspace_jax"):
        assert_same_bits(restored(train.Checkpoints(two, read_only=True)), states[2])
    assert "has no digests" in caplog.text
    truncate_arrays(two / "2")
    assert_same_bits(restored(train.Checkpoints(two, read_only=True)), states[1])


@pytest.mark.parametrize(
    "position",
    [
        "null",
        *(
            f'{{"phase": 0, "rows": [], "data": {text}}}'
            for text in ("null", '{"next_index": null}', '{"next_index": 1}', '{"next_index": "2"}')
        ),
    ],
)
def test_restore_passes_over_a_position_that_is_none_where_there_are_no_digests(position, states, tmp_path):
    _, data = regression()
    batches, checkpoints = data.train(0), train.Checkpoints(tmp_path)
    for step in (1, 2):
        next(batches)
        checkpoints.save(states[step], record_of(batches))
    checkpoints.close()
    for step in "12":
        (tmp_path / step / "digests.json").unlink()
    (tmp_path / "2" / "run" / "metadata").write_text(position)
    other = data.train(0)
    assert_same_bits(restored(train.Checkpoints(tmp_path), take=at_position(other)), states[1])
    assert other.get_state() == {"next_index": 1}


def test_restore_says_where_an_iterator_does_not_take_the_position(states, tmp_path):
    class Other:
        def get_state(self):
            return {"next_index": 1}

        def set_state(self, state):
            raise KeyError("shard")

    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(states[1], record_of(Other()))
    checkpoints.close()
    with pytest.raises(ValueError, match=r"data: the iterator does not take the position in .*1/run \('shard'\)"):
        restored(train.Checkpoints(tmp_path), take=at_position(Other()))


def test_a_step_that_is_not_there_is_answered_with_those_that_are(states, tmp_path):
    checkpoints = save(tmp_path, states, {1: None, 2: None})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*; there are \[1, 2\]"):
        restored(checkpoints, step=7)
    assert_same_bits(restored(checkpoints, step=1), states[1])


def test_no_checkpoint_gives_none(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    assert restored(checkpoints) is None
    assert (checkpoints.steps(), checkpoints.best_step()) == ([], None)


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(states, tmp_path):
    class Other(Regression):
        def init(self, key):
            _, variables = super().init(key)
            return {"w": jnp.zeros(9), "bias": jnp.zeros(())}, {"seen": variables["seen"].astype(jnp.float32)}

        def axes(self):
            return {"w": jax.P(), "bias": jax.P()}, {"seen": jax.P()}

    checkpoints = save(tmp_path, states, {1: None})
    with pytest.raises(train.CheckpointMismatchError, match=r"step 1 in .* is of another model") as refused:
        checkpoints.restore(expected(Other()))
    lines = {line.strip() for line in str(refused.value).split("\n")[1:]}
    assert lines >= {
        "params/bias: not in the checkpoint",
        "variables/mean: only in the checkpoint",
        "params/w: float32[8] in the checkpoint, float32[9] in the model",
        "variables/seen: int32[] in the checkpoint, float32[] in the model",
    }
    assert checkpoints.steps() == [1]


def test_a_checkpoint_of_another_optimizer_is_refused(states, tmp_path):
    with pytest.raises(train.CheckpointMismatchError, match=r"opt_state.*trace.*: only in the checkpoint"):
        save(tmp_path, states, {1: None}).restore(expected(tx=optax.sgd(0.1)))


@pytest.mark.slow
def test_a_refused_run_leaves_the_workdir_as_it_was(tmp_path):
    from subspace_jax.represent.gcr import task as classify

    settings = ["data.name=union_of_subspaces", "model.features=()", "model.dims=(2,)", "train.steps=2"]
    config = train.override(classify.default_config(), settings)
    train.run(config, tmp_path, progress=False)
    before = (tmp_path / "config.json").read_text(), (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(train.CheckpointMismatchError):
        train.run(train.override(config, ["model.dims=(3,)"]), tmp_path, progress=False)
    assert before == ((tmp_path / "config.json").read_text(), (tmp_path / "metrics.jsonl").read_text())
    assert train.evaluate_run(tmp_path)[0] == 2


@pytest.mark.parametrize("best", ["accuracy", "max", "max:", "most:accuracy"])
def test_best_has_one_form(best, tmp_path):
    with pytest.raises(ValueError, match="best: expected 'max:METRIC' or 'min:METRIC'"):
        train.Checkpoints(tmp_path, best=best)


def test_at_least_one_checkpoint_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1 checkpoint, got 0"):
        train.Checkpoints(tmp_path, keep=0)


def test_the_position_in_the_data_is_saved_once_for_all_processes(tmp_path, states):
    _, data = regression()
    batches = data.train(0)
    for _ in range(3):
        next(batches)
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(states[3], record_of(batches))
    next(batches)
    checkpoints.wait()
    found = json.loads((tmp_path / "3" / "run" / "metadata").read_text())
    assert found == {"phase": 0, "rows": [], "data": {"next_index": 3}}
    other = data.train(0)
    restored(checkpoints, take=at_position(other))
    np.testing.assert_array_equal(next(other)["inputs"], next(_skip(data.train(0), 3))["inputs"])
    checkpoints.close()


def _skip(batches, count):
    for _ in range(count):
        next(batches)
    return batches
