import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.mark.slow
def test_optimizer_benchmark_runs_all_parts(tmp_path):
    output = tmp_path / "optimizers.json"
    command = [sys.executable, SCRIPTS / "bench" / "optimizers.py", "--quick", "--rounds", "1", "--output", output]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert all(report[part] for part in ("refresh", "steps", "lora", "problem"))
    # Figures that are no times: states, and the loss of the first optimizer after twenty steps.
    states = {row["name"]: row["state_bytes"] for row in report["steps"]}
    assert states["apollo"] < states["optax.adamw"] / 3
    assert report["problem"][0]["loss"] < 0.2
