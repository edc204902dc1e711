import os
import pathlib
import re
import socket
import subprocess
import sys

import chex
import jax
import pytest

from subspace_jax import interop

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_load_their_own_shards_and_save_one_folder(checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    source, target = checkpoint("llama"), tmp_path / "out"
    cache = jax.config.jax_compilation_cache_dir
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.interop.worker", str(index), "2", str(port), source, target],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    for index, text in enumerate(printed):
        read, total = map(int, re.search(rf"{index}: read (\d+) of (\d+)", text).groups())
        # Half of all, and the norms, which every device has.
        assert read < 0.55 * total
    written, original = (interop.load_causal_lm(folder)[1] for folder in (target, source))
    chex.assert_trees_all_equal(written, original)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
