import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.mark.slow
def test_anomaly_benchmark_compares_scores_and_weighs_a_stream(tmp_path):
    output = tmp_path / "anomaly.json"
    command = [sys.executable, SCRIPTS / "bench" / "anomaly.py", "--quick", "--rounds", "1", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert {row["op"] for row in report["rows"]} == {"score", "fit"}
    assert all(row["seconds"]["scikit-learn"] > 0 for row in report["rows"])
    assert report["images_per_second"]["pixels, 256"] > 0
