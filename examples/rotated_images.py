"""Adapts a vision transformer or a residual network of :mod:`subspace_jax.nn` to digits rotated by 90 degrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from examples import rotated_digits
from examples.rotated_digits import digits, labelled_data
from examples.transfer import ClassificationTask, TransferTask, phases
from subspace_jax import nn, train

SIDE = 32  # of the images, each pixel four by four

CONFIGS = {
    "vit": nn.VisionTransformerConfig(
        family="vit", image_size=(SIDE, SIDE), patch_size=8, width=48, num_layers=3, num_heads=4, mlp_size=96,
        num_classes=10, channels=1,
    ),
    "resnet": nn.ResNetConfig.resnet(
        18, depths=(1, 1), widths=(16, 32), stem=(16,), channels=1, num_classes=10
    ),
}  # fmt: skip
_TARGETS = {"vit": ("layers/attn/*/kernel", "layers/mlp/*/kernel"), "resnet": ("stage*/*/layer?/conv",)}


def default_config() -> ConfigDict:
    """Returns the fields of a run: those of every run, and ``adapter`` of :func:`subspace_jax.train.default_adapter`.

    ``model.name`` is "vit" or "resnet"; the latter with ``adapter.window`` 2.  Other fields: see
    :mod:`examples.rotated_digits`; the schedule is a cosine over 45 epochs.
    """
    config = rotated_digits.default_config()
    with config.unlocked():
        config.task = "examples.rotated_images"
        config.optim.schedule = "cosine"
        config.optim.learning_rate = 1e-2
        config.train.epochs = 45.0
        config.model = ConfigDict({"name": "vit"})
        config.pretrain = ConfigDict({"epochs": 15, "learning_rate": 2e-3})
    return config


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, see :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field is invalid.
    """
    name = config.model.name
    if name not in CONFIGS:
        raise ValueError(f"model.name: expected one of {tuple(CONFIGS)}, got {name!r}")
    settings = train.adapter_settings(config.adapter, _TARGETS[name])
    images, labels = digits(config.seed)
    images = (2 * images - 1).repeat(SIDE // 8, axis=1).repeat(SIDE // 8, axis=2)[..., None]
    sets = [labelled_data(x, labels, config.data) for x in (images, np.rot90(images, axes=(1, 2)))]
    fresh, apply = _network(name)
    tasks = ClassificationTask(apply, fresh), TransferTask(apply, fresh, settings)
    return train.Run(phases(*tasks, tuple(sets), config.pretrain))


def _network(name: str):
    """Returns a function that draws the parameters of a network, and one that maps them and images to logits."""
    config = CONFIGS[name]
    if name == "vit":
        init = functools.partial(nn.init_params, config=config)
        return init, lambda params, x: nn.vision_transformer_apply(config, params, x).logits
    shapes = nn.param_shapes(config)[1]
    # Batch normalization keeps its initial statistics, so that the network has parameters and no variables.
    ones = {"mean": jnp.zeros, "var": jnp.ones}

    def apply(params, x):
        stats = jax.tree_util.tree_map_with_path(lambda path, s: ones[path[-1].key](s.shape, s.dtype), shapes)
        return nn.resnet_apply(config, params, stats, x).logits

    return lambda key: nn.init_params(key, config)[0], apply
