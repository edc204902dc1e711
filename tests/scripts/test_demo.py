import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_demo_trains_compares_draws_and_resumes(tmp_path):
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, SCRIPTS / "demo.py", "--workdir", tmp_path / "demo", "--seeds", "1", "--heads"]
    done = subprocess.run([*command, "softmax", "k8"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mesh.data=2 mesh.tensor=2" in done.stdout
    assert "Going on from step 1080" in done.stderr
    assert "step 1098/1098  eval: " in done.stderr
    rows = {row["head"]: row for row in json.loads((tmp_path / "demo" / "table.json").read_text())}
    assert rows["k8"]["accuracy"] >= 0.97
    assert rows["k8"]["orthonormality_error"] <= 1e-5
    for picture in ("curves.png", "angles.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
