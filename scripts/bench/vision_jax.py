"""The side of subspace_jax in the benchmark of vision models."""

import functools
import math
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the peer

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import interop, losses, nn

wait = jax.block_until_ready


def write(folder, model, run):
    """Writes random weights; returns the number of parameters."""
    fields = {"num_classes": run["classes"]}
    if model == "vit_s":
        fields |= {
            "image_size": run["size"],
            "fused_qkv": False,
            "antialias_positions": False,
        }  # as transformers has it
        if run["quick"]:
            fields |= {"width": 32, "num_layers": 2, "num_heads": 2, "mlp_size": 64}
        config = nn.VisionTransformerConfig.vit("small", **fields)
        params = counted = nn.init_params(jax.random.key(0), config)
    else:
        sizes = {"depths": (1, 1), "widths": (16, 32), "stem": (8,)} if run["quick"] else {}
        config = nn.ResNetConfig.resnet(50, convention="hf", **fields, **sizes)
        counted, stats = nn.init_params(jax.random.key(0), config)
        # Branches of an initialized network end with a scale of 0, which would leave all inside them unchecked.
        counted = jax.tree.map(lambda x: x + 0.1 if x.ndim == 1 else x, counted)
        params = {"params": counted, "batch_stats": stats}
    interop.save_vision(folder, config, params, layout="hf")
    return sum(math.prod(x.shape) for x in jax.tree.leaves(counted))


def forward(folder, images, labels, run):
    config, params = interop.load_vision(folder)
    params = nn.unstack_layers(params)
    pixels = jnp.asarray(images)
    apply = jax.jit(lambda params, pixels: nn.vision_apply(config, params, pixels, dtype=run["dtype"]).logits)
    return lambda: apply(params, pixels)


def training(folder, images, labels, run):
    config, tree = interop.load_vision(folder)
    tree = nn.unstack_layers(tree)
    pixels, labels = jnp.asarray(images), jnp.asarray(labels)
    has_statistics = isinstance(config, nn.ResNetConfig)
    params, stats = (tree["params"], tree["batch_stats"]) if has_statistics else (tree, None)
    tx = optax.sgd(run["learning_rate"], momentum=run["momentum"])

    def loss_fn(params, stats):
        tree = {"params": params, "batch_stats": stats} if has_statistics else params
        out = nn.vision_apply(config, tree, pixels, train=True, dtype=run["dtype"])
        return jnp.mean(losses.cross_entropy(out.logits, labels)), out.batch_stats

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        params, stats, opt_state = state
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    state = (params, stats, tx.init(params))

    def call():
        nonlocal state
        state, loss = step(state)
        return loss

    return call


def to_numpy(out):
    return np.asarray(out.astype(jnp.float32))


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
