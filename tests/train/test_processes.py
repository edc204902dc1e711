import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from subspace_jax import train
from subspace_jax.train import loop

from . import worker
from .common import assert_close

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.eight_devices


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A run of two processes with four devices each: its workdir and what each process printed."""
    workdir = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cache = jax.config.jax_compilation_cache_dir
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.worker", str(index), "2", str(port), str(workdir)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return workdir, printed


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    return workdir, worker.fit(workdir)


def test_two_processes_equal_one(two_processes, one_process):
    expected = jax.tree.map(np.asarray, one_process[1].state)
    for index in range(2):
        with np.load(two_processes[0] / f"process_{index}.npz") as saved:
            assert_close(list(saved.values()), jax.tree.leaves(expected), atol=1e-5)


def test_each_process_reads_its_own_rows(two_processes):
    rows = [json.loads(re.search(r"\d: rows (\[.*\])", text)[1]) for text in two_processes[1]]
    assert rows[0] + rows[1] == next(worker.problem()[2].train(0))["labels"].tolist()


def test_only_the_first_process_writes_metrics(two_processes, one_process):
    rows, expected = (train.read_metrics(workdir / "metrics.jsonl") for workdir in (two_processes[0], one_process[0]))
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    # One file for each of the three times that the run was started, and not one for each process.
    assert len(list((two_processes[0] / "tensorboard").iterdir())) == 3


def test_all_processes_resume_together_also_past_damage_that_one_of_them_meets(two_processes):
    for text, reason in zip(two_processes[1], ("found by another process", "torn"), strict=True):
        assert "interrupted" in text
        assert "Going on from step 4" in text
        assert re.search(rf"The checkpoint of step 8 in .* is damaged \({reason}\)", text)
        assert "Going on from step 7" in text


def test_processes_that_would_hold_the_same_rows_are_refused(two_processes):
    for text in two_processes[1]:
        assert "refused mesh: data=1, fsdp=1, tensor=8 gives the processes {0: 1, 1: 1} of 1 shards" in text


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(two_processes, one_process, caplog):
    with caplog.at_level("INFO", "subspace_jax"):
        moved = worker.fit(two_processes[0], num_steps=10)
    assert "Going on from step 8" in caplog.text
    assert_close(moved.state, worker.fit(one_process[0], num_steps=10).state, atol=1e-5)
