"""Configs by name, and what their docstrings say."""

import ast
import sys

import pytest

from subspace_jax import config_files, train
from subspace_jax.cli.main import main

each_config = pytest.mark.parametrize("name", config_files.config_names())


@pytest.mark.parametrize("spelling", ["gcr/digits", "gcr/digits.py", "configs/gcr/digits.py", "configs/gcr/digits"])
def test_find_config_takes_names_away_from_the_clone(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find_config(spelling) == config_files.CONFIGS / "gcr" / "digits.py"


def test_find_config_prefers_a_file_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gcr").mkdir()
    (tmp_path / "gcr" / "digits.py").write_text("")
    assert config_files.find_config("gcr/digits.py").resolve() == tmp_path / "gcr" / "digits.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gcr/digts", "no config gcr/digts; there is gcr/digits"),
        ("digits", "no config digits; there is gcr/digits"),
        ("lm", "no config lm; there is lm/gpt2_medium_e2e, lm/large, lm/smollm2, lm/tiny"),
        ("configs/gcr/digts.py", "no file configs/gcr/digts.py; there is gcr/digits"),
        ("xyzzy", "no config xyzzy$"),
    ],
)
def test_find_config_names_configs_close_to_a_missing_one(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        config_files.find_config(name)


def test_load_config_says_where_a_config_needs_a_clone(monkeypatch):
    monkeypatch.setitem(sys.modules, "examples", None)
    with pytest.raises(ValueError, match="its task lies in examples/, which comes with a clone"):
        train.load_config("adapters/rotated_digits:dora")


@each_config
def test_docstring_of_a_config_names_its_command_and_default_variant(name):
    config = config_files.read_config_file(name)
    assert len(config.summary) > 20
    tree = ast.parse(config.path.read_text())
    (get_config,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_config")
    default = [node.value for node in get_config.args.defaults]
    assert bool(config.variants) == bool(default)
    assert f"--config {name}" in ast.get_docstring(tree)
    assert all(variant in config.variants for variant in default)


@each_config
def test_needs_clone_is_told_by_the_task(name):
    task = train.load_config(name).task
    assert config_files.read_config_file(name).needs_clone == task.startswith("examples.")


def test_configs_lists_what_matches_and_names_what_is_close(capsys):
    assert main(["configs", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "lm/tiny" in printed
    assert "galore (arXiv 2403.03507)" in printed
    assert "gcr/digits" not in printed
    assert main(["configs", "rotated"]) == 0
    assert "needs a clone" in capsys.readouterr().out
    assert main(["configs", "digitz"]) == 1
    assert "did you mean gcr/digits" in capsys.readouterr().err
