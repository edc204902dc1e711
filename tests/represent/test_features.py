"""Features of a model that is sharded over the devices of two processes."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.represent import worker

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_features_of_gives_each_of_two_processes_all_examples(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.represent.worker", str(index), str(port), str(tmp_path / f"{index}.npz")],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    features, labels = worker.features()
    assert features.shape == (2000, 8)
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as saved:
            np.testing.assert_array_equal(saved["labels"], labels)
            np.testing.assert_allclose(saved["features"], features, rtol=1e-5, atol=1e-6)
