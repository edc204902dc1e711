import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.mark.slow
def test_benchmark_of_projected_updates_compares_with_an_svd_for_each_fraction(tmp_path):
    output = tmp_path / "project_update.json"
    command = [sys.executable, SCRIPTS / "bench" / "project_update.py", "--quick", "--rounds", "1", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert row["error"] <= 1e-3
    assert row["ratio"] > 0
