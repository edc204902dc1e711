"""The ``>>>`` examples in docstrings run."""

import doctest
import importlib
import pathlib

import pytest

import subspace_jax

PACKAGE = pathlib.Path(subspace_jax.__file__).parent
MODULES = sorted(
    ".".join(("subspace_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail; the output shows them"


def test_optimizers_have_docstring_examples():
    assert "subspace_jax.optim.manifold.riemannian_sgd" in MODULES
    assert "subspace_jax.optim.manifold.geometry" in MODULES
