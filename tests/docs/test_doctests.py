"""The ``>>>`` examples in docstrings run, module by module, and the transforms that are to have one do."""

import doctest
import importlib
import pkgutil

import pytest

import subspace_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(subspace_jax.__path__, "subspace_jax.")
    if not module.name.endswith("__main__")
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail; the output shows them"


def test_there_are_examples():
    modules = [importlib.import_module(name) for name in MODULES]
    examples = {test.name: test.examples for module in modules for test in doctest.DocTestFinder().find(module)}
    assert examples["subspace_jax.optim.manifold.riemannian_sgd.riemannian_sgd"]
    assert examples["subspace_jax.optim.manifold.geometry.with_geometry"]
