"""Grassmann class representation and its baselines on scikit-learn's digits (arXiv 2308.01547).

    subspace-jax train --config gcr/digits:k8 --workdir work/digits_k8

Variants: ``softmax``, ``cosine``, ``k1``, ``k8``.

An MLP 64-128-64 with the head on top, 60 epochs on 1200 images: about 10 seconds on two CPU cores.  Figure to reach:
``k8`` 0.97 test accuracy as a mean over ``seed=0``, ``1``, ``2`` (0.975 to 0.988 is usual, ``softmax`` 0.967 to 0.982).
"""

from subspace_jax.represent.gcr import task as classify

VARIANTS = ("softmax", "cosine", "k1", "k8")


def get_config(variant="k8"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "digits"
    config.data.batch_size = 64
    config.model.features = (128, 64)
    config.model.head = variant if variant in ("softmax", "cosine") else "grassmann"
    config.model.dims = (int(variant[1:]),) if config.model.head == "grassmann" else (1,)
    config.optim.learning_rate = 0.03
    config.train.epochs = 60.0
    config.train.eval_every = 90
    config.train.checkpoint_every = 90
    return config
