import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.mark.slow
def test_benchmark_of_heads_compares_them_with_the_scan_and_scipy(tmp_path):
    output = tmp_path / "heads.json"
    command = [sys.executable, SCRIPTS / "bench" / "attention_ssm.py", "--quick", "--rounds", "1", "--output", output]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [256, 512]
    assert all(row["error"] <= 1e-4 and row["ratio"]["lfilter"] > 0 for row in rows)
