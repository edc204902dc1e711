"""Runs of several processes through the command: preemption, a process that dies, resuming with another number."""

import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from subspace_jax import train

from .common import assert_same_bits

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [pytest.mark.eight_devices, pytest.mark.slow]
CONFIG = """
from subspace_jax.represent.gcr import task

def get_config():
    config = task.default_config()
    config.data.name = "union_of_subspaces"
    config.data.batch_size = 64
    config.model.features = (16,)
    config.model.dims = (2,)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 4, 2
    config.train.steps = 100_000
    config.train.log_every = 1
    config.train.eval_every = 100_000
    config.train.checkpoint_every = 5
    return config
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(arguments, count):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count)}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    return [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments(index))],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def start_command(config, workdir, *settings):
    """Two processes of the command."""
    port = free_port()
    common = ["train", "--quiet", "--config", config, "--workdir", workdir, *settings]
    common += ["--coordinator", f"localhost:{port}", "--num-processes", 2, "--start-timeout", 60, "--heartbeat", 10]
    return start(lambda index: ["subspace_jax.cli.main", *common, "--process-id", index], 2)


def wait_for_step(processes, workdir, step):
    deadline = time.monotonic() + 120
    while max((row["step"] for row in train.read_metrics(workdir / "metrics.jsonl")), default=0) < step:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(processes, timeout):
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)
    return file


def test_all_processes_leave_after_the_same_step_when_one_of_them_is_told_to(config, tmp_path):
    workdir = tmp_path / "run"
    processes = start_command(config, workdir)
    try:
        wait_for_step(processes, workdir, 3)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        printed = finish(processes, timeout=120)
    assert [process.returncode for process in processes] == [75, 75], "\n".join(printed)
    steps = {int(re.search(r"stopped by SIGTERM after step (\d+), which is saved", text)[1]) for text in printed}
    assert len(steps) == 1
    rows = train.read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, max(steps) + 1))
    moved = ["mesh.fsdp=2", "mesh.tensor=4"]
    one, other = train.restore(workdir), train.restore(workdir, settings=moved)
    assert int(one.state.step) == max(steps)
    assert one.phase.num_steps == 100_000
    assert_same_bits(one.state, other.state)


def test_a_process_whose_peer_dies_ends_and_says_why_and_the_run_goes_on(config, tmp_path):
    workdir = tmp_path / "run"
    processes = start_command(config, workdir)
    try:
        wait_for_step(processes, workdir, 12)
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
    finally:
        printed = finish(processes, timeout=120)
    # A heartbeat of 10 s is given up on after that time; the rest is a busy machine.
    assert time.monotonic() - began < 60
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode != 0
    assert re.search(r"lost another one|another task died", printed[0]), printed[0]
    last = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    again = start_command(config, workdir, f"--config.train.steps={last + 20}")
    printed = finish(again, timeout=120)
    assert [process.returncode for process in again] == [0, 0], "\n".join(printed)
    assert f"Going on from step {last}" in printed[0]


def test_what_four_processes_leave_two_take_up_on_another_mesh_with_the_same_bits(config, tmp_path):
    workdir = tmp_path / "run"
    states = {}
    for count, sizes in ((4, {"fsdp": 8, "tensor": 1}), (2, {"fsdp": 4, "tensor": 2})):
        port = free_port()
        settings = ["train.steps=7", *(f"mesh.{name}={size}" for name, size in sizes.items())]

        def worker(index, count=count, port=port, settings=settings):
            return ["tests.train.elastic_worker", index, count, port, workdir, config, *settings]

        processes = start(worker, count)
        printed = finish(processes, timeout=200)
        assert [process.returncode for process in processes] == [0] * count, "\n".join(printed)
        for index in range(count):
            with np.load(workdir / f"state_{count}_{index}.npz") as saved:
                states[count, index] = list(saved.values())
    assert "Going on from step 7" in printed[0]
    for state in states.values():
        assert_same_bits(state, states[4, 0])


def test_a_disk_that_takes_no_more_ends_the_command_which_names_the_folder(tmp_path):
    config = tmp_path / "config.py"
    wide = CONFIG.replace("100_000", "10").replace("1, 4, 2", "1, 1, 1").replace("(16,)", "(256, 256)")
    config.write_text(wide)

    def limit():
        # No file of this process gets larger: what a write then meets is an error, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "subspace_jax.cli.main", "train", "--quiet", "--config", str(config)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "checkpoints: can't write the" in done.stderr
    assert str(tmp_path / "run" / "checkpoints") in done.stderr


def test_runs_killed_at_random_times_end_as_if_they_were_not(tmp_path):
    kills = 3
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace("100_000", "60").replace("1, 4, 2", "1, 1, 1"))
    command = [sys.executable, ROOT / "scripts/kill_test.py", "--config", config, "--workdir", tmp_path / "kills"]
    done = subprocess.run([*map(str, command), "--kills", str(kills)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'"kills": {kills}' in done.stdout
