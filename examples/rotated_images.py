"""Runs that adapt a vision transformer or a residual network of :mod:`subspace_jax.nn` to digits that are turned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from examples import rotated_digits
from examples.rotated_digits import NUM_TRAIN, digits
from examples.transfer import TransferTask, check_pretraining, train_whole
from subspace_jax import data, nn, train

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

    ``model.name`` is "vit" or "resnet"; for the second ``adapter.window`` is 2.  ``pretrain`` is of the network itself,
    on upright digits.  The rest is as in :mod:`examples.rotated_digits`, with a cosine of 45 epochs.
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


def build(config: ConfigDict) -> tuple[TransferTask, train.Data]:
    """Makes the task and the data of a config, as :func:`subspace_jax.train.build` asks for them.

    Raises:
      ValueError: A field can't serve.
    """
    name = config.model.name
    if name not in CONFIGS:
        raise ValueError(f"model.name: expected one of {tuple(CONFIGS)}, got {name!r}")
    check_pretraining(config.pretrain)
    settings = train.adapter_settings(config.adapter, _TARGETS[name])
    images, labels = digits(config.seed)
    images = (2 * images - 1).repeat(SIDE // 8, axis=1).repeat(SIDE // 8, axis=2)[..., None]
    turned = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
    fresh, apply = _network(name)
    pretrain = functools.partial(
        train_whole,
        apply,
        inputs=images[:NUM_TRAIN],
        labels=labels[:NUM_TRAIN],
        key=jax.random.key(config.seed + 1),
        epochs=config.pretrain.epochs,
        learning_rate=config.pretrain.learning_rate,
    )
    task = TransferTask(apply, fresh, pretrain, settings, seed=config.seed)
    learn, test = (
        {"inputs": turned[part], "labels": labels[part]} for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))
    )
    batches = functools.partial(data.train_batches, learn, batch_size=config.data.batch_size)
    batches(seed=config.seed)  # what is wrong with batch size or seed shows now
    return task, train.Data(
        batch_size=config.data.batch_size,
        steps_per_epoch=data.steps_per_epoch(NUM_TRAIN, config.data.batch_size),
        train=lambda seed: batches(seed=seed),
        evaluate=data.eval_passes(test, config.data.eval_batch_size),
    )


def _network(name: str):
    """What draws the parameters of a network, and what maps them and images to logits."""
    config = CONFIGS[name]
    if name == "vit":
        init = functools.partial(nn.init_params, config=config)
        return init, lambda params, x: nn.vision_transformer_apply(config, params, x).logits
    shapes = nn.param_shapes(config)[1]
    # The network learns with the statistics that it begins with, means of 0 and variances of 1, so that the frozen base
    # is parameters alone.
    ones = {"mean": jnp.zeros, "var": jnp.ones}

    def apply(params, x):
        stats = jax.tree_util.tree_map_with_path(lambda path, s: ones[path[-1].key](s.shape, s.dtype), shapes)
        return nn.resnet_apply(config, params, stats, x).logits

    return lambda key: nn.init_params(key, config)[0], apply
