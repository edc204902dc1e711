"""Golden folders of convolutional networks and Swin, read without the loader."""

import functools
import json
import pathlib

import jax
import numpy as np

from subspace_jax import interop, nn

FOLDERS = pathlib.Path(__file__).parents[1] / "golden" / "interop_vision"


@functools.cache
def arrays(name):
    """The inputs and outputs of the reference."""
    with np.load(FOLDERS / name / "io.npz") as archive:
        return dict(archive)


def fields(name):
    return json.loads((FOLDERS / name / "config.json").read_text())


def tensors(name):
    """All tensors of a folder, as they are stored."""
    return {key: np.array(tensor.read()) for key, tensor in interop.open_folder(FOLDERS / name).items()}


def names_of(name):
    return interop.swin_names if name.startswith("swin") else interop.resnet_names


def load(name, stored=None, **changes):
    """Config and arrays of a folder; ``stored`` in the place of its tensors."""
    module, layout = names_of(name), "timm" if "timm" in name else "hf"
    stored = tensors(name) if stored is None else stored
    stored = {ours: stored[theirs] for theirs, ours in module.canonical_names(stored, layout).items()}
    shapes = {key: value.shape for key, value in stored.items()}
    read = module.config_from_timm if layout == "timm" else module.config_from_hf
    config = read({**fields(name), **changes}, shapes)
    return config, interop.read_tensors(module.tensor_names(config), stored)


def pixels(name, key="pixel_values"):
    return np.ascontiguousarray(arrays(name)[key].transpose(0, 2, 3, 1))


@functools.partial(jax.jit, static_argnames=("config", "train", "capture"))
def run_resnet(config, tree, images, train=False, capture="all"):
    with jax.default_matmul_precision("highest"):
        return nn.resnet_apply(config, tree["params"], tree["batch_stats"], images, train=train, capture=capture)


@functools.partial(jax.jit, static_argnames=("config", "capture"))
def run_swin(config, params, images, capture="all"):
    with jax.default_matmul_precision("highest"):
        return nn.swin_apply(config, params, images, capture=capture)
