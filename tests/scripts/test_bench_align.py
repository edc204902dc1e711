import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.mark.slow
def test_alignment_benchmark_compares_and_weighs_local_cka_and_neighbours(tmp_path):
    output = tmp_path / "align.json"
    command = [sys.executable, SCRIPTS / "bench" / "align.py", "--quick", "--rounds", "1", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {row["op"] for row in rows} == {"local_cka", "mutual_knn"}
    for row in rows:
        assert row["error"] <= 1e-4
        assert row["seconds"]["numpy"] > 0
        assert row["peak_bytes"]["subspace_jax"] is None or row["peak_bytes"]["subspace_jax"] > 50e6
