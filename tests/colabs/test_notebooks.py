"""Every notebook runs from top to bottom, with the assertions of its last cell."""

import os
import pathlib
import sys

import nbformat
import pytest
from nbclient import NotebookClient

COLABS = pathlib.Path(__file__).parents[2] / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def execute(path, tmp_path, monkeypatch, **env):
    """Runs a notebook with the kernel of this environment, regardless of installed kernels."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    environment = {
        **os.environ,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "subspace_jax" / "xla")
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **env,
    }
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys\nprint(sys.prefix)"))
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=environment)
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def check(notebook):
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert notebook.cells[-1].outputs[0].text.strip() == sys.prefix
    shows = [cell for cell in notebook.cells if "plt.show()" in cell.source]
    for cell in shows:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
    assert "assert" in notebook.cells[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_fast_mode(path, tmp_path, monkeypatch):
    check(execute(path, tmp_path, monkeypatch, SUBSPACE_JAX_FAST="1"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_full(path, tmp_path, monkeypatch):
    check(execute(path, tmp_path, monkeypatch, SUBSPACE_JAX_FAST="0"))
