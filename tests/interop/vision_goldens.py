"""The golden checkpoints of vision models, and what the libraries that they come from computed with them."""

import functools
import itertools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import interop, losses, nn
from subspace_jax.interop.tensors import to_stored

from .conftest import rewrite

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop_vision"

# Programs that run once: optimizing their machine code takes half of the compilation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Sums over tokens and features in another order than in torch change the sixth digit.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}
HF = ("vit", "vit_model", "deit_distilled")
DUAL = ("clip", "clip_legacy", "siglip")
TIMM = ("vit_timm", "deit3_timm", "deit_distilled_timm", "clip_vision_timm", "siglip_vision_timm")


@functools.cache
def stored(name):
    with np.load(GOLDEN / name / "io.npz") as archive:
        return dict(archive)


@functools.cache
def loaded(name):
    return interop.load_vision(GOLDEN / name)


# Rematerialization does not change the results.
REMAT = {"vit_timm": "dots", "deit3_timm": "full"}


def forward(name, params, pixels, **options):
    with jax.default_matmul_precision("highest"):
        return nn.vision_transformer_apply(loaded(name)[0], params, pixels, capture="all", **options)


@functools.cache
def found(name):
    """What a golden checkpoint gives for its images."""
    return jit(lambda params, x: forward(name, params, x))(loaded(name)[1], pixels(name))


@functools.cache
def gradients(name):
    """The loss of a golden checkpoint, and its gradients."""
    labels = jnp.asarray(stored(name)["labels"], jnp.int32)

    def loss(params):
        output = forward(name, params, pixels(name), options=nn.LayerOptions(remat=REMAT.get(name, "none")))
        return jnp.mean(losses.cross_entropy(output.logits, labels))

    return jit(jax.value_and_grad(loss))(loaded(name)[1])


def pixels(name, key="pixel_values"):
    return jnp.asarray(stored(name)[key].transpose(0, 2, 3, 1))


def in_files(tensors, tree):
    """Arrays of ours by their names in files."""

    def own(tensor):
        value = np.asarray(functools.reduce(lambda node, key: node[key], tensor.place.path, tree))
        return to_stored(tensor, value if tensor.place.layer is None else value[tensor.place.layer])

    groups = itertools.groupby(sorted(tensors, key=lambda t: (t.name, t.part)), lambda t: t.name)
    blocks = {name: [own(tensor) for tensor in parts] for name, parts in groups}
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in blocks.items()}


def gradients_are(golden, tensors, grads):
    """Compares gradients of parameters with those of the tensors that they are stored in, where the golden has them."""
    found = in_files([tensor for tensor in tensors if f"grad:{tensor.name}" in golden], grads)
    for name, value in found.items():
        chex.assert_trees_all_close(value, golden[f"grad:{name}"], atol=1e-5, rtol=1e-3)
    return len(found)


def copy(name, folder, tensors=None, **changes):
    """Copies a checkpoint, with other tensors or with some fields of its config changed (``...`` removes one)."""
    folder.mkdir(exist_ok=True)
    for file in (GOLDEN / name).iterdir():
        if file.is_file() and file.name != "io.npz":
            (folder / file.name).write_bytes(file.read_bytes())
    fields = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    if tensors is not None:
        rewrite(folder, lambda _: tensors)
    return folder


@functools.partial(jax.jit, static_argnames=("config", "train", "capture"))
def run_resnet(config, tree, images, train=False, capture="all"):
    with jax.default_matmul_precision("highest"):
        return nn.resnet_apply(config, tree["params"], tree["batch_stats"], images, train=train, capture=capture)
