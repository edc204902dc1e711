import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import subspace_jax


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_loads_no_subpackage_and_not_even_jax():
    loaded = run_python("import sys, subspace_jax; print(*[m for m in sys.modules if 'jax' in m])")
    assert loaded == ["subspace_jax"]


def test_no_subpackage_touches_a_device_on_import():
    code = (
        "import subspace_jax, importlib, jax, sys\n"
        "for name in subspace_jax._SUBPACKAGES: importlib.import_module(f'subspace_jax.{name}')\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert run_python(code) == ["False"]


def test_every_folder_is_reachable_as_an_attribute():
    folders = {module.name for module in pkgutil.iter_modules(subspace_jax.__path__) if module.ispkg}
    assert folders == set(subspace_jax._SUBPACKAGES)
    for name in folders:
        assert getattr(subspace_jax, name).__name__ == f"subspace_jax.{name}"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = subspace_jax.nonsense


def test_every_public_name_exists_and_is_documented():
    for folder in subspace_jax._SUBPACKAGES:
        module = importlib.import_module(f"subspace_jax.{folder}")
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert thing.__doc__, f"{folder}.{name}"
