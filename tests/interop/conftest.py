"""Checkpoints for tests: the golden ones, and fresh ones of any size."""

import json
import pathlib

import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.interop.tensors import stored_shape

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop"
MODELS = ("gpt2", "llama", "llama31", "mistral", "qwen2", "llama_sharded", "qwen3", "gemma2", "gemma3")


# Llama and Mistral differ in their fields only, shards in files only; the last ones have quick tests of their own.
_SLOW = ("mistral", "llama_sharded", "qwen3", "gemma2", "gemma3")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in _SLOW else []) for name in MODELS])
def model(request):
    """Each golden checkpoint in turn, by name."""
    return request.param


@pytest.fixture
def checkpoint():
    """The folder of a golden checkpoint."""
    return lambda name: GOLDEN / name


@pytest.fixture
def expected():
    """What the authors' code returns: inputs, logits, hidden states."""

    def load(name):
        # The sharded checkpoint has the weights of the other one.
        with np.load(GOLDEN / name.removesuffix("_sharded") / "io.npz") as archive:
            return dict(archive)

    return load


@pytest.fixture
def copied(tmp_path):
    """Copies a golden checkpoint, with some fields of its config changed (None removes one)."""

    def copy(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in (GOLDEN / name).iterdir():
            if file.name != "io.npz":
                (folder / file.name).write_bytes(file.read_bytes())
        fields = {**json.loads((folder / "config.json").read_text()), **changes}
        fields = {key: value for key, value in fields.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return copy


@pytest.fixture
def write_random():
    """Writes a checkpoint of random numbers, one tensor at a time; returns its bytes."""

    def write(folder, config, dtype=np.float32):
        folder.mkdir(parents=True)
        specs, rng = nn.causal_lm_specs(config), np.random.default_rng(0)
        shapes = {t.name: (stored_shape(specs, t), np.dtype(dtype)) for t in interop.tensor_names(config)}
        tensors = (rng.random(shape, np.float32).astype(d) for shape, d in shapes.values())
        interop.write_safetensors(folder / "model.safetensors", shapes, tensors)
        (folder / "config.json").write_text(json.dumps(interop.config_to_hf(config)))
        return sum(int(np.prod(shape)) * d.itemsize for shape, d in shapes.values())

    return write


def tensors_of(folder):
    """All tensors of a folder, by name."""
    return {name: np.array(t.read()) for name, t in interop.open_folder(folder).items()}


def rewrite(folder, change):
    """Puts changed tensors in the place of those of a single-file checkpoint."""
    tensors = change(tensors_of(folder))
    shapes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    interop.write_safetensors(folder / "model.safetensors", shapes, tensors.values())
