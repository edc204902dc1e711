import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import sysconfig
import venv

import numpy as np
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


def distributions(names):
    """Returns the distributions of these names with all that they require, without extras."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            required = [text for text in found[name].requires or () if "extra ==" not in text]
            todo += [re.match(r"[\w.-]+", text)[0] for text in required if "python_version" not in text]
    return found.values()


def test_dir_of_a_subpackage_shows_its_public_names_alone():
    for folder in subspace_jax._SUBPACKAGES:
        module = importlib.import_module(f"subspace_jax.{folder}")
        if hasattr(module, "__all__"):
            assert dir(module) == sorted(module.__all__)


@pytest.fixture(scope="module")
def core_python(tmp_path_factory):
    """The Python of an environment that has JAX, Optax, NumPy, what they require, and the library."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions(["jax", "optax", "numpy"]):
        for top in {
            file.parts[0] for file in distribution.files if not file.parts[0].startswith(("..", "__pycache__"))
        }:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    (packages / "subspace_jax").symlink_to(pathlib.Path(subspace_jax.__file__).parent)
    return folder / "bin" / "python"


def call_core(core_python, code):
    environment = {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([core_python, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_optimizers_manifolds_kernels_and_adapters_need_jax_optax_and_numpy_alone(core_python):
    code = (
        "import jax, jax.numpy as jnp, optax, importlib.util\n"
        "assert importlib.util.find_spec('flax') is None\n"
        "from subspace_jax import adapters, kernels, linalg, losses, manifolds, metrics, nn, optim\n"
        "params = {'w': jnp.ones((4, 3))}\n"
        "optim.galore(1e-2), optim.riemannian_sgd(0.1)\n"
        "adapters.LoRA(2, 4.0)\n"
        "print(nn.linear(jnp.ones((2, 4)), params['w']).shape)"
    )
    ended = call_core(core_python, code)
    assert ended.stdout == "(2, 3)\n", ended.stderr


@pytest.mark.parametrize(
    "code",
    ["import subspace_jax.train", "from subspace_jax.nn import Model", "from subspace_jax import data"],
)
def test_what_needs_the_extra_train_names_it(code, core_python):
    ended = call_core(core_python, code)
    assert "pip install 'subspace-jax[train]'" in ended.stderr.splitlines()[-1]


def test_the_command_searches_the_index_without_an_extra_and_names_the_extra_for_runs(core_python):
    run = "import sys; from subspace_jax.cli.main import main; sys.exit(main({}))"
    assert "gcr" in call_core(core_python, run.format(["methods", "grassmann"])).stdout
    ended = call_core(core_python, run.format(["train", "--config", "gcr/digits:k8", "--workdir", "x"]))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "pip install 'subspace-jax[train]'" in ended.stderr


@pytest.fixture(scope="module")
def installed_command(tmp_path_factory):
    """Calls the command of a wheel in an environment of its own, in a folder away from the clone."""
    folder = tmp_path_factory.mktemp("wheel")

    def call(*command):
        options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}}
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)

    root = pathlib.Path(__file__).parents[1]
    built = call(sys.executable, "-m", "pip", "wheel", root, "--no-deps", "-w", folder)
    assert built.returncode == 0, built.stderr
    # With pip, by which fetch downloads.
    venv.create(folder / "venv", with_pip=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python, command = (folder / "venv" / "bin" / name for name in ("python", "subspace-jax"))
    installed = call(python, "-m", "pip", "install", "--no-deps", *folder.glob("*.whl"))
    assert installed.returncode == 0, installed.stderr
    return folder, functools.partial(call, command)


@pytest.mark.slow
def test_a_wheel_away_from_the_clone_trains_a_shipped_config(installed_command):
    folder, call = installed_command
    run = ("train", "--quiet", "--workdir", "run", "--config.train.epochs=1")
    trained = call(*run, "--config", "gcr/digits:k8")
    assert trained.returncode == 0, trained.stderr
    assert json.loads((folder / "run" / "result.json").read_text())["accuracy"] > 0.3
    refused = call(*run, "--config", "adapters/rotated_digits:dora")
    assert refused.returncode == 2
    assert "comes with a clone of the repository" in refused.stderr


@pytest.mark.slow
def test_a_wheel_away_from_the_clone_fetches_and_fine_tunes_smollm2(installed_command):
    folder, call = installed_command
    fetched = call("fetch", "smollm2")
    if "can't download" in fetched.stderr:
        pytest.skip(fetched.stderr)
    assert fetched.returncode == 0, fetched.stderr
    sizes = ("--config.train.steps=2", "--config.optim.warmup_steps=0", "--config.data.eval_rows=8")
    tuned = call("finetune", "--config", "lm/smollm2:lora", "--workdir", "w", *sizes)
    assert tuned.returncode == 0, tuned.stderr
    assert np.isfinite(json.loads((folder / "w" / "result.json").read_text())["loss"])
    assert (folder / "w" / "adapter" / "adapter_model.safetensors").is_file()
