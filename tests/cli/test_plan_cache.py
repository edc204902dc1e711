"""``plan``: the cache, and what it writes where."""

import subprocess
import sys

import pytest

from subspace_jax import planning
from subspace_jax.cli.main import main
from tests.planning.test_report import PLAN

CONFIG = """
from subspace_jax import train

def get_config():
    config = train.default_config()
    config.task = "tests.planning.phases"
    return config
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Arguments of ``plan``, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.py").write_text(CONFIG)
    return ["plan", "--config", str(tmp_path / "config.py"), "--topology", "h100:4"]


@pytest.fixture
def planned(monkeypatch):
    """What was planned, and does nothing else."""
    names = []

    def plan():
        names.append("step")
        return PLAN

    monkeypatch.setattr(planning, "plan_programs", lambda *a, **k: [planning.Program("step", plan)])
    return names


def test_plan_shows_the_cached_plan_until_it_is_to_plan_anew(command, planned, capsys):
    assert main(command) == 0
    first = capsys.readouterr()
    assert planned == ["step"]
    assert first.out.startswith("v5e:2x4: step, 8 chips")
    assert "h100:4: lowering step (1 of 1) …" in first.err.splitlines()
    assert main(command) == 0
    second = capsys.readouterr()
    assert planned == ["step"]
    assert second.out == f"From the cache; --no-cache plans anew.\n\n{first.out}"
    assert second.err == ""
    assert main([*command, "--no-cache"]) == 0
    assert planned == ["step", "step"]
    assert capsys.readouterr().out == first.out


def test_plan_plans_anew_for_other_fields(command, planned):
    for arguments in ([], ["--config.seed=2"], ["--mesh", "fsdp=4"], ["--mesh", "data=4"]):
        assert main([*command, *arguments]) == 0
    assert len(planned) == 3  # data=4 is the mesh of the first


def test_plan_sweep_says_how_many_plans_are_cached(command, planned, tmp_path, capsys):
    arguments = [*command, "--mesh", "fsdp=4", "--mesh", "fsdp=2", "--plot", str(tmp_path / "plan.png")]
    assert main(arguments) == 0
    assert "from the cache" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert "2 of 2 plans are from the cache; --no-cache plans anew" in capsys.readouterr().out
    assert len(planned) == 2


@pytest.mark.slow
def test_plan_for_a_tpu_writes_its_progress_alone_to_standard_error(command, configs, tmp_path):
    script = "import sys; from subspace_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*command[:-1], "v5e:1x1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=configs.parent
    )
    assert done.returncode == 0, done.stderr
    assert "Estimated speed" in done.stdout
    assert [line for line in done.stderr.splitlines() if not line.startswith("v5e:1x1: ")] == []
