"""Runs of the proving tasks: uninterrupted, and interrupted in a middle phase and resumed."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from subspace_jax import train

from ..common import Interrupted, assert_same_bits

ROOT = pathlib.Path(__file__).parents[3]


class StopAt(train.Hook):
    """Ends a run after a step: by an exception, or as ``kill -9`` does."""

    def __init__(self, step, kill=False):
        self._step, self._kill = step, kill

    def on_step(self, step, metrics, batch):
        if step == self._step:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted


def fit(run, workdir, *hooks, **options):
    return train.fit(dataclasses.replace(run, workdir=workdir, progress=False, **options), hooks)


def rows_without_training(result):
    return [row for row in result.rows if row["split"] != "train"]


def assert_resumes(run, folder, steps, whole, **options):
    """A run that is interrupted after each of some steps ends with the bits and the rows of one that was not."""
    for step in steps:
        with pytest.raises(Interrupted):
            fit(run, folder / "interrupted", StopAt(step), **options)
    resumed = fit(run, folder / "interrupted", **options)
    assert_same_bits(jax.device_get(resumed.state), jax.device_get(whole.state))
    assert resumed.rows == whole.rows
    assert resumed.metrics == whole.metrics


def start(name, workdir, devices, kill_at=0):
    command = [sys.executable, "-m", "tests.train.proving.worker", name, str(workdir), str(devices), str(kill_at)]
    cache = jax.config.jax_compilation_cache_dir
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def assert_survives_kill(name, folder, devices, step):
    """A process that is killed after a step, and one that goes on from there, end with the bits of another run."""
    killed = start(name, folder / "killed", devices, step)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for workdir in ("killed", "whole"):
        done = start(name, folder / workdir, devices)
        assert done.returncode == 0, done.stderr
    (first, second) = (dict(np.load(folder / workdir / "state.npz")) for workdir in ("killed", "whole"))
    assert_same_bits(first, second)
    first, second = ((folder / workdir / "metrics.jsonl").read_text() for workdir in ("killed", "whole"))
    assert first == second
