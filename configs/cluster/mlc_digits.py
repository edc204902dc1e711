"""MLC: features near orthogonal subspaces, and clusters, on scikit-learn's digits (arXiv 2301.01805).

    subspace-jax train --config cluster/mlc_digits --workdir work/mlc

Variants: ``mlc`` (the default) has both phases, ``pretrain`` the first alone.
"""

from subspace_jax.cluster.mlc import task as mlc

VARIANTS = ("mlc", "pretrain")


def get_config(variant="mlc"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = mlc.default_config()
    config.train.log_every = 20
    config.train.checkpoint_every = 200
    if variant == "pretrain":
        config.mlc.steps = 0
    return config
