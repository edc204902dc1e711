"""Whose code a folder may name: tasks of this library, and others only where that is asked for."""

import json
import sys

import pytest

from subspace_jax import language, represent, train
from subspace_jax.cli.main import main
from subspace_jax.represent.gcr import task as classify


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder whose config names a module beside it, which leaves a mark where it is imported."""
    (tmp_path / "evil_task.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = json.loads(json.dumps(classify.default_config().to_dict()))
    (folder / "config.json").write_text(json.dumps({**config, "task": "evil_task"}))
    yield folder
    sys.modules.pop("evil_task", None)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: train.restore(folder),
        lambda folder: train.evaluate_run(folder, settings=["train.steps=2"]),
        lambda folder: language.export(folder, folder / "out"),
        lambda folder: represent.open_feature_model(folder),
    ],
    ids=["restore", "evaluate_run", "export", "open_feature_model"],
)
def test_a_task_of_somebody_else_that_a_workdir_names_is_not_imported(read, workdir):
    with pytest.raises(ValueError, match=r"task: .*config\.json names the module 'evil_task', .*--trust-remote-code"):
        read(workdir)
    assert not (workdir.parent / "mark").exists()


@pytest.mark.parametrize("trust", [[], ["--trust-remote-code"]], ids=str)
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--workdir", "RUN"],
        ["export", "--workdir", "RUN", "--out", "OUT"],
        ["features", "--model", "RUN", "--data", "photos", "--out", "OUT.npz"],
        ["transfer", "--model", "RUN", "--data", "photos"],
    ],
    ids=lambda command: command[0],
)
def test_commands_import_the_task_of_a_workdir_only_with_the_flag(command, trust, workdir, capsys):
    (workdir.parent / "photos").mkdir()
    names = {"RUN": str(workdir), "OUT": str(workdir.parent / "out"), "OUT.npz": str(workdir.parent / "out.npz")}
    photos = str(workdir.parent / "photos")
    status = main([*({**names, "photos": photos}.get(part, part) for part in command), *trust])
    error = capsys.readouterr().err
    assert status == 2
    assert "\n" not in error.strip()
    if command[0] in ("eval", "export"):
        # With the flag it is imported, and then found to be no task.
        assert ("has no function build(config)" in error) == bool(trust)
        assert (workdir.parent / "mark").exists() == bool(trust)
    else:
        assert (workdir.parent / "mark").exists() <= bool(trust)


@pytest.mark.parametrize("task", [None, 3, "", ".classify", "subspace_jax", "subspace_jax.no_such", "a\0b", "os.path"])
def test_a_task_that_is_no_module_of_this_library_is_refused_in_one_line(task, workdir):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "task": task}))
    with pytest.raises(ValueError, match=r"^task: [^\n]*$"):
        train.restore(workdir)


def test_build_names_a_module_that_raises_when_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_task.py").write_text("1 / 0\n")
    config = train.override(classify.default_config(), ["task=broken_task"])
    with pytest.raises(ValueError, match="ZeroDivisionError: division by zero"):
        train.build(config)
