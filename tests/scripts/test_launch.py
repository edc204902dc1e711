"""The launchers: what they would call, and a run that one of them starts for real."""

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
DIGITS = ["train", "--config", "configs/gcr/digits.py:k8"]


def call(name, *arguments, **environment):
    # Beside this Python lies the shellcheck of the test extra.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gpus.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(script):
    found = call("shellcheck", LAUNCH / script)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gpus.sh", "slurm.sbatch"])
def test_a_launcher_without_a_command_shows_how_it_is_called(script):
    ended = call("bash", LAUNCH / script)
    assert ended.returncode == 2
    assert script in ended.stderr
    assert "train" in ended.stderr


def test_a_tpu_slice_runs_the_command_on_all_machines():
    arguments = [*DIGITS, "--workdir", "/mnt/runs/a b"]
    printed = call(LAUNCH / "tpu_vm.sh", "run", "slice", "zone", *arguments, DRY_RUN="1").stdout
    words = shlex.split(printed)
    assert words[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=zone", "--worker=all"]
    command = words[8].removeprefix("--command=cd subspace_jax && exec .venv/bin/subspace-jax ")
    assert shlex.split(command) == arguments


def test_a_tpu_slice_gets_the_committed_files_and_its_own_environment():
    printed = call(LAUNCH / "tpu_vm.sh", "install", "slice", "zone", DRY_RUN="1").stdout
    copied, installed = map(shlex.split, printed.splitlines())
    assert copied[4] == "scp"
    assert copied[6] == "slice:subspace_jax.tar.gz"
    assert "--worker=all" in copied
    assert "--worker=all" in installed
    assert "pip install -q -c constraints.txt '.[train,tpu,text]'" in installed[-1]


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (75, True), (76, False), (77, True)])
def test_slurm_puts_a_stopped_run_into_the_queue_again(tmp_path, status, again):
    for name, body in {"srun": f'echo "$@"; exit {status}', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ended = call("bash", LAUNCH / "slurm.sbatch", *DIGITS, PATH=path, SLURM_JOB_ID="12")
    assert shlex.split(ended.stdout.splitlines()[0])[-len(DIGITS) :] == DIGITS
    assert ("requeue 12" in ended.stdout) == again
    assert ended.returncode == (0 if again else status)
    given_up = call("bash", LAUNCH / "slurm.sbatch", *DIGITS, PATH=path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="20")
    assert "requeue" not in given_up.stdout
    assert given_up.returncode == status


def test_machines_over_ssh_get_one_process_each():
    printed = call(LAUNCH / "gpus.sh", "node1,node2", *DIGITS, DRY_RUN="1").stdout
    lines = dict(line.split(": ", 1) for line in printed.splitlines())
    for place, host in enumerate(("node1", "node2")):
        words = shlex.split(lines[host])
        options = f"--coordinator node1:8476 --num-processes 2 --process-id {place}".split()
        assert words == ["cd", str(ROOT), "&&", "exec", ".venv/bin/subspace-jax", *DIGITS, *options]


def test_the_manifest_asks_for_the_machines_of_its_topology():
    manifest = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert (ROOT / container["args"][1].removeprefix("--config=")).exists()


def test_the_image_copies_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert sources
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.slow
def test_a_run_on_two_machines_saves_and_leaves_at_sigterm(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [*DIGITS, "--workdir", tmp_path / "run", "--quiet", "--config.train.epochs=100000"]
    run = subprocess.Popen(
        [LAUNCH / "gpus.sh", "localhost,localhost", *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PORT": str(port)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/metrics.jsonl")) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
        _, printed = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 75, printed
    saved = [path for path in tmp_path.glob("run/checkpoints/*") if path.name.isdecimal()]
    assert saved, printed
