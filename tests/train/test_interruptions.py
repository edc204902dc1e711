"""Interruptions of a run: preemption, data that hangs, values that are not finite, a full disk, missing processes."""

import contextlib
import functools
import io
import logging
import os
import signal
import socket
import threading
import time

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tqdm.contrib.logging import logging_redirect_tqdm

from subspace_jax import train
from subspace_jax.cli import processes as cli_processes
from subspace_jax.cli.main import main
from subspace_jax.train import interruptions, processes, progress

from .common import Breaking, assert_same_bits, regression

NUM_STEPS = 9
TX = optax.sgd(0.05)


class Before(Breaking):
    """An iterator that calls a function before it gives the batch of one number."""

    def __init__(self, batches, at, act):
        super().__init__(batches, at)
        self._act = act

    def __next__(self):
        if self._batches.get_state()["next_index"] == self._at:
            self._act()
        return next(self._batches)


def acting(data, at, act):
    return data._replace(train=lambda seed: Before(data.train(seed), at, act))


@pytest.fixture
def run(fit, tmp_path):
    task, data = regression()
    return functools.partial(fit, task, TX, num_steps=NUM_STEPS, workdir=tmp_path / "run"), data


def test_sigterm_ends_the_step_saves_and_goes_on_to_the_same_bits(run, fit, tmp_path):
    go, data = run
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(train.Preempted, match="SIGTERM after step 5") as stopped:
        go(acting(data, 4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.value.step == 5
    assert signal.getsignal(signal.SIGTERM) is before
    # Not a step at which a checkpoint was due: they are at 1, 3, 4, 6; that of step 3 was not the best, nor evaluated.
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [4, 5]
    again = go(data)
    whole = go(data, workdir=tmp_path / "whole")
    assert_same_bits(again.state, whole.state)
    assert (tmp_path / "run/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("interval", [3, 1, 2, 8])
def test_a_kill_while_a_slow_checkpoint_is_written_costs_one_interval_at_most(interval, run, monkeypatch, tmp_path):
    go, data = run
    given, lost = [], []

    class Slow:
        def result(self, timeout=None):
            time.sleep(0.2)  # by now the loop has come to the next checkpoint, and waits
            whole = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdecimal()]
            lost.append(given[-1].get_state()["next_index"] - max(whole, default=0))

    write = ocp.StandardCheckpointHandler.async_save

    async def slowly(*arguments, **options):
        return [*(await write(*arguments, **options)), Slow()]

    def train_batches(seed):
        given.append(data.train(seed))
        return given[-1]

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", slowly)
    go(data._replace(train=train_batches), num_steps=16, eval_every=0, checkpoint_every=interval)
    assert len(lost) == (16 if interval == 1 else 11 if interval == 3 else 32 // interval)
    assert max(lost) == interval


def test_the_command_tells_by_its_exit_code_why_it_ended(monkeypatch, configs, tmp_path, capsys):
    endings = [
        (train.Preempted(7, "work"), 75, "SIGTERM after step 7"),
        (train.NotFiniteError("3 steps in a row"), 76, "3 steps in a row"),
        (TimeoutError("data: the training data gave nothing"), 2, "data: the training data gave nothing"),
    ]
    for error, status, message in endings:
        monkeypatch.setattr(train, "run", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        assert main(["train", "--config", f"{configs}/gcr/synthetic.py:k2", "--workdir", str(tmp_path)]) == status
        assert message in capsys.readouterr().err
    # A fault of the program is none of these.
    assert cli_processes.ending(RuntimeError("a fault")) == (None, "")


@pytest.mark.slow
def test_data_that_hangs_ends_the_run_and_is_named(run):
    go, data = run
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"data: the training data gave nothing for 0.5 s"):
        go(acting(data, 4, lambda: never.wait(20)), data_timeout=0.5)
    never.set()
    assert int(go(data, data_timeout=30.0).state.step) == NUM_STEPS


def test_what_the_data_raises_comes_through_the_thread_that_waits_for_it():
    timed = interruptions.Timed(iter([1]), 5.0, "training data")
    assert next(timed) == 1
    with pytest.raises(StopIteration):
        next(timed)
    timed.close()


def test_a_burst_of_nan_is_skipped_and_an_endless_one_ends_the_run_with_its_batch_saved(fit, tmp_path):
    task, data = regression()
    broken = set()

    class Broken(Breaking):
        def __next__(self):
            index = self._batches.get_state()["next_index"]
            batch = next(self._batches)
            return batch | {"labels": batch["labels"] * np.float32(np.nan)} if index in broken else batch

    made = data._replace(train=lambda seed: Broken(data.train(seed), 0))
    broken |= {3, 4}
    go = functools.partial(fit, task, TX, made, num_steps=NUM_STEPS, workdir=tmp_path, max_skipped=3)
    assert int(go().state.skipped) == 2
    broken |= set(range(9, 20))
    with pytest.raises(train.NotFiniteError, match=r"3 steps in a row up to step 12 .*not_finite_12_0.npz"):
        go(num_steps=20)
    with np.load(tmp_path / "not_finite_12_0.npz") as saved:
        assert np.isnan(saved["labels"]).all()
        assert saved["inputs"].shape == (16, 8)


def test_a_full_disk_is_named_and_what_was_saved_stays(run, monkeypatch, tmp_path):
    go, data = run
    save = ocp.CheckpointManager.save

    def full(self, step, *arguments, **options):
        if step > 3:
            raise OSError(28, "No space left on device")
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match=r"checkpoints: can't write the checkpoint of step 4 .*No space left on device"):
        go(data)
    monkeypatch.undo()
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    assert int(go(data).state.step) == NUM_STEPS


def gone():
    """A stream whose reader is gone, as that of ``| head``."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


def test_a_run_goes_on_where_nobody_reads_its_progress(run, monkeypatch):
    go, data = run
    with contextlib.suppress(BrokenPipeError), gone() as stream:
        monkeypatch.setattr("sys.stderr", stream)
        assert int(go(data, progress=True).state.step) == NUM_STEPS


def test_messages_of_the_command_come_once_and_make_way_for_its_progress_bar():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.Logger("a run")
    logger.addHandler(handler)
    with (
        contextlib.redirect_stderr(interruptions.Lasting(stream)),
        logging_redirect_tqdm([logger]),
        progress.progress_bar(2, 0, show=True) as bar,
    ):
        logger.warning("one line")
        bar.update()
    assert stream.getvalue().count("one line") == 1
    assert "\rone line\n" in stream.getvalue()  # after the bar was cleared


def test_the_command_ends_quietly_where_nobody_reads_its_output(monkeypatch, configs, tmp_path, capfd):
    monkeypatch.setattr(train, "run", lambda *a, **k: train.FitResult(None, {"loss": 1.0}, (), {}))
    for arguments, status in (
        (["info"], 141),
        (["train", "--config", f"{configs}/gcr/synthetic.py:k2", "--workdir", str(tmp_path)], 0),
    ):
        stream = gone()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stream)
            assert main(arguments) == status
        stream.close()  # raises nothing: what is left goes nowhere
        assert "Traceback" not in capfd.readouterr().err


def test_the_command_names_output_that_can_not_be_written(monkeypatch, capfd):
    with open("/dev/full", "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        assert main(["info"]) == 2
    assert capfd.readouterr().err == "subspace-jax: can't write the output (No space left on device)\n"


def test_times_and_counts_below_zero_are_refused(run):
    go, data = run
    for name in ("data_timeout", "max_skipped"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 0, got -1"):
            go(data, **{name: -1})


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({**SLURM, "SLURM_NTASKS": "2"}, processes.Cluster("Slurm", None, 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, processes.Cluster("a TPU slice")),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            processes.Cluster("JAX_COORDINATOR_ADDRESS", "a:1", 4, 3),
        ),
    ],
)
def test_the_processes_are_found_in_the_environment_of_a_scheduler(environment, expected):
    assert train.find_cluster(environment=environment) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, r"--num-processes, --process-id: needed too; got \['--coordinator'\]"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator: expected host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id: expected 0 to 1"),
        ({"environment": {"JAX_COORDINATOR_ADDRESS": "a:1"}}, "JAX_COORDINATOR_ADDRESS is set"),
    ],
)
def test_half_a_description_of_the_processes_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.find_cluster(**arguments)


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_named_after_the_timeout():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))  # bound and not listening: nobody answers, and nobody else takes it
        address = f"localhost:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"process 1 of 2 got no answer from {address} within 1 s"):
            train.initialize(address, 2, 1, timeout=1.0)
        assert time.monotonic() - began < 20
