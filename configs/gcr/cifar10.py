"""CIFAR-10 with a small convolutional network and a Grassmann head (arXiv 2308.01547).

    python -m subspace_jax.data.prepare cifar10     # once, with network
    subspace-jax train --config gcr/cifar10:k8 --workdir work/cifar10_k8

Variants: ``softmax``, ``k1``, ``k8``.

Meant for an accelerator.  It has not been run to completion yet: there is neither a time nor a figure to reach.
"""

from subspace_jax.represent.gcr import task as classify

VARIANTS = ("softmax", "k1", "k8")


def get_config(variant="k8"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "cifar10"
    config.data.batch_size = 256
    config.data.eval_batch_size = 1000
    config.data.augment = True
    config.model.backbone = "convnet"
    config.model.features = (64, 128, 256)
    config.model.head = "softmax" if variant == "softmax" else "grassmann"
    config.model.dims = (1,) if variant == "softmax" else (int(variant[1:]),)
    config.model.dtype = "bfloat16"
    config.optim.learning_rate = 0.1
    config.optim.kwargs = {"weight_decay": 1e-4}
    config.optim.warmup_steps = 500
    config.train.epochs = 60.0
    return config
