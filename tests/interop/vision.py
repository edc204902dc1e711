"""Golden folders of vision models, and copies of them with something changed."""

import functools
import itertools
import json
import pathlib

import jax
import numpy as np

from subspace_jax import interop, nn
from subspace_jax.interop.tensors import to_stored

FOLDERS = pathlib.Path(__file__).parents[1] / "golden" / "interop_vision"


@functools.cache
def arrays(name):
    """The inputs and outputs of the reference."""
    with np.load(FOLDERS / name / "io.npz") as archive:
        return dict(archive)


def tensors(folder):
    """All tensors of a folder, as they are stored."""
    return {key: np.array(tensor.read()) for key, tensor in interop.open_folder(folder).items()}


def changed(folder, name, stored=None, **fields):
    """Writes a golden folder with other tensors or fields of its config."""
    stored = tensors(FOLDERS / name) if stored is None else stored
    config = {**json.loads((FOLDERS / name / "config.json").read_text()), **fields}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {key: (value.shape, value.dtype) for key, value in stored.items()}
    interop.write_safetensors(folder / "model.safetensors", shapes, stored.values())
    return folder


def in_files(names, tree):
    """Arrays of ours by their names in files."""

    def own(tensor):
        value = tree
        for key in tensor.place.path:
            value = value[key]
        return to_stored(tensor, np.asarray(value))

    groups = itertools.groupby(sorted(names, key=lambda t: (t.name, t.part)), lambda t: t.name)
    blocks = {name: [own(tensor) for tensor in parts] for name, parts in groups}
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in blocks.items()}


def pixels(name, key="pixel_values"):
    return np.ascontiguousarray(arrays(name)[key].transpose(0, 2, 3, 1))


@functools.partial(jax.jit, static_argnames=("config", "train", "capture"))
def run_resnet(config, tree, images, train=False, capture="all"):
    with jax.default_matmul_precision("highest"):
        return nn.resnet_apply(config, tree["params"], tree["batch_stats"], images, train=train, capture=capture)
