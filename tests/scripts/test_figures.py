"""The runner of the index's figures, with commands that are not run."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from subspace_jax.methods import METHODS, Figure
from tests.scripts.test_demo import SCRIPTS

SPEC = importlib.util.spec_from_file_location("figures", SCRIPTS / "figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)

GCR = next(method for method in METHODS if method.name == "gcr")


@pytest.fixture
def calls(monkeypatch):
    """Replaces processes: a run writes the accuracy 0.9 and a tenth of its seed."""
    calls = []

    def fake(arguments, **_):
        calls.append(arguments)
        if "pytest" in arguments:
            file = pathlib.Path(arguments[-1].removeprefix("--junitxml="))
            file.write_text(
                '<testsuites><testsuite failures="1" errors="0"><testcase><properties><property name="gain" '
                'value="0.25"/></properties></testcase></testsuite></testsuites>'
            )
            return figures.subprocess.CompletedProcess(arguments, 1)
        run = pathlib.Path(arguments[arguments.index("--workdir") + 1])
        run.mkdir(exist_ok=True)
        (run / "result.json").write_text(json.dumps({"accuracy": 0.9 + int(arguments[-1][-1]) / 100}))
        return figures.subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(figures.subprocess, "run", fake)
    monkeypatch.setattr(figures, "commit", lambda: "abc")
    return calls


def test_run_appends_folder_and_seed_and_does_not_repeat_a_finished_run(calls, tmp_path):
    command = "subspace-jax train --config gcr/digits:k8"
    first = figures.run(command, 2, tmp_path)
    assert first["accuracy"] == pytest.approx(0.92)
    assert calls[0][1:6] == ["-m", "subspace_jax.cli.main", "train", "--config", "gcr/digits:k8"]
    assert calls[0][-1] == "--config.seed=2"
    assert figures.run(command, 2, tmp_path) == first
    assert len(calls) == 1
    figures.run(command, 2, tmp_path, restart=True)
    assert len(calls) == 2


def test_run_reads_failures_and_properties_of_pytest(calls, tmp_path):
    found = figures.run("python -m pytest tests/none.py", 0, tmp_path)
    assert (found["failures"], found["gain"]) == (1, 0.25)


def test_run_ends_with_the_status_of_a_command_that_failed(monkeypatch, tmp_path):
    failed = figures.subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(figures.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(SystemExit, match="ended with status 2"):
        figures.run("subspace-jax train --config x", 0, tmp_path)


@pytest.mark.parametrize(
    ("figure", "baseline", "reached", "met"),
    [
        (Figure("a", "x", "m", at_least=0.5), [], 0.5, True),
        (Figure("a", "x", "m", at_most=0.4), [], 0.5, False),
        (Figure("a", "x", "m", reduce="median", at_most=0.4), [], 0.3, True),
        (Figure("a", "x", "m", minus="y", at_least=0.2), [0.2, 0.3, 0.4], 0.2, True),
        (Figure("a", "x", "m", over="y", at_most=1.0), [0.2, 0.3, 0.4], 0.5 / 0.3, False),
    ],
)
def test_measured_reduces_over_seeds_and_compares_with_the_bounds(figure, baseline, reached, met):
    entry = figures.measured(figure, [0.3, 0.2, 1.0], baseline)
    assert entry["reached"] == pytest.approx(reached)
    assert entry["met"] == met


def test_commands_of_a_method_hold_baselines_and_no_run_twice():
    runs = figures.commands_of(GCR)
    assert len(set(runs)) == len(runs)
    assert ("subspace-jax train --config gcr/synthetic:k1", 2) in runs


def test_tables_of_readme_and_pages_are_those_of_the_measured_figures():
    stale = [path.name for path, text in figures.pages().items() if path.read_text() != text]
    assert not stale, f"`make figures-table` rewrites {stale}"


def test_main_names_methods_close_to_an_unknown_one(capsys):
    for name, message in (("svfitt", "did you mean svfit?"), ("nonsense", "there are gcr, ")):
        with pytest.raises(SystemExit) as stop:
            figures.main(["--only", "gcr", name])
        assert stop.value.code == 2
        assert f"--only: no method {name!r}; {message}" in capsys.readouterr().err


def test_make_figures_refuses_an_unknown_method_before_it_installs(tmp_path):
    command = ["make", "figures", "ONLY=svfitt", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=figures.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "--only: no method 'svfitt'; did you mean svfit?" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_main_writes_json_and_fails_where_a_bound_is_missed(calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "pages", dict)
    monkeypatch.setattr(figures, "device", lambda: "a machine")
    arguments = ["--only", "gcr", "--work", str(tmp_path / "work")]
    assert figures.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "gcr 1/" in printed
    assert "MISSED" in printed
    found = json.loads((tmp_path / GCR.figure_file).read_text())
    assert found["figures"][0]["values"] == pytest.approx([0.9, 0.91, 0.92])
    assert found["versions"]["jax"]
    assert found["commit"] == "abc"
