import json
import os
import subprocess
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS

pytest.importorskip("torch", reason="the peer comes with the extra bench")
pytest.importorskip("transformers", reason="the peer comes with the extra bench")


@pytest.mark.slow
def test_vision_benchmark_compares_times_and_weighs_both_sides(tmp_path):
    output = tmp_path / "vision.json"
    command = [sys.executable, SCRIPTS / "bench" / "vision.py", "--quick", "--rounds", "1", "--output", output]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [(row["model"], row["op"]) for row in report["rows"]] == [
        (model, op) for model in ("vit_s", "resnet50") for op in ("forward", "training")
    ]
    for row in report["rows"]:
        assert row["check"]["error"] <= row["check"]["allowed"]
        assert row["ratio"] > 0
        assert row["mfu"] is None  # no GPU, no data sheet
    assert min(report["pipeline"][name] for name in ("training", "evaluation")) > 0
