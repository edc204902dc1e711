import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS

pytest.importorskip("torch", reason="the peer comes with the extra bench")
pytest.importorskip("transformers", reason="the peer comes with the extra bench")


@pytest.mark.slow
def test_language_model_benchmark_compares_times_and_weighs_both_sides(tmp_path):
    output = tmp_path / "lm.json"
    command = [sys.executable, SCRIPTS / "bench" / "lm.py", "--quick", "--rounds", "1", "--output", output]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["op"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["forward", "training", "generation"]
    for row in rows.values():
        assert row["check"]["error"] <= row["check"]["allowed"]
        assert row["ratio"] > 0
        assert row["mfu"] is None  # no GPU, no data sheet
        for memory in row["memory"].values():
            # A process that imports either library takes more than 50 MB; where the system doesn't tell, None.
            assert memory["peak"] is None or memory["peak"] > 50e6
