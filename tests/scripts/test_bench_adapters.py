import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS

pytest.importorskip("torch", reason="the peer comes with the extra bench")
pytest.importorskip("peft", reason="the peer comes with the extra bench")


@pytest.mark.slow
def test_adapter_benchmark_compares_times_and_weighs_both_sides(tmp_path):
    output = tmp_path / "adapters.json"
    command = [sys.executable, SCRIPTS / "bench" / "adapters.py", "--quick", "--rounds", "2", "--output", output]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [(row["op"], row["method"]) for row in rows] == [
        (op, method) for op in ("forward", "training") for method in ("lora", "dora")
    ]
    for row in rows:
        assert row["error"] <= 1e-4
        assert row["speed_up"] > 0
        for memory in row["memory"].values():
            # A process that imports either library takes more than 50 MB; where the system doesn't tell, None.
            assert memory["peak"] is None or memory["peak"] > 50e6
