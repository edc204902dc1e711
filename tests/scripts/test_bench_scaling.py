import importlib.util
import json
import sys

import pytest

from tests.scripts.test_demo import SCRIPTS


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("scaling", SCRIPTS / "bench" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scaling(script, monkeypatch):
    """The script with two small cases, on GPUs, for which nothing is compiled."""
    config = "configs/gcr/synthetic.py:k2"
    cases = {
        "grows": (config, (), 8, script.slices("h100", ("2", "4"), data=-1)),
        "fixed": (config, ("data.batch_size=64",), None, script.slices("h100", ("2", "4"), data=-1)),
    }
    monkeypatch.setattr(script, "CASES", cases)
    return script


def run(scaling, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, arguments)])
    scaling.main()


@pytest.mark.slow
def test_plans_are_saved_shown_and_plotted(scaling, monkeypatch, tmp_path, capsys):
    kept, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    run(scaling, monkeypatch, "--only", "grows", "--chips", "2", "--json", kept)
    run(scaling, monkeypatch, "--json", kept, "--plot", picture)
    examples = {name: [plan["examples"] for plan in plans] for name, plans in json.loads(kept.read_text()).items()}
    assert examples == {"grows": [16, 32], "fixed": [64, 64]}
    shown = capsys.readouterr().out
    assert shown.count("grows h100:2 …") == 1  # the second run had it
    last = [line for line in shown.splitlines() if line.startswith("| fixed | h100:4")][-1]
    assert "| 4 x 1 x 1 | 64 |" in last
    assert "| ? |" in last  # no compiler says what is sent between GPUs
    assert picture.stat().st_size > 1000


def test_all_cases_are_configs_with_slices_that_there_are(script):
    for path, fields, _, slices in script.CASES.values():
        if path is not None:
            script.train.override(script.train.load_config(str(script.ROOT / path)), fields)
        for topology, mesh in slices:
            script.planning.mesh_sizes(mesh, topology, script.planning.find_topology(topology)[1])
