import importlib
import inspect
import json
import os
import pathlib
import pkgutil
import subprocess
import sys
import sysconfig
import venv

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


@pytest.mark.slow
def test_a_wheel_away_from_the_clone_trains_a_shipped_config(tmp_path):
    def call(*command):
        options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}}
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)

    root = pathlib.Path(__file__).parents[1]
    built = call(sys.executable, "-m", "pip", "wheel", root, "--no-deps", "-w", tmp_path)
    assert built.returncode == 0, built.stderr
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python, command = (tmp_path / "venv" / "bin" / name for name in ("python", "subspace-jax"))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps")
    installed = call(*pip, *tmp_path.glob("*.whl"))
    assert installed.returncode == 0, installed.stderr

    run = ("train", "--quiet", "--workdir", tmp_path / "run", "--config.train.epochs=1")
    trained = call(command, *run, "--config", "gcr/digits:k8")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"] > 0.3
    refused = call(command, *run, "--config", "adapters/rotated_digits:dora")
    assert refused.returncode == 2
    assert "comes with a clone of the repository" in refused.stderr
