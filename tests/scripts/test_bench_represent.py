import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.mark.slow
def test_representation_benchmark_compares_and_weighs_retrieval_metrics_beside_scikit_learn(tmp_path):
    output = tmp_path / "represent.json"
    script = SCRIPTS / "bench" / "represent.py"
    command = [sys.executable, script, "--quick", "--only", "retrieval", "--rounds", "1", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["retrieval"]
    assert {row["op"] for row in rows} == {"cmc", "retrieval_map", "recall_at_k"}
    for row in rows:
        assert row["error"] <= 2e-3
        assert row["seconds"]["scikit-learn"] > 0
        assert row["peak_bytes"]["subspace_jax"] is None or row["peak_bytes"]["subspace_jax"] > 50e6
