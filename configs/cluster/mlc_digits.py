"""MLC: features near orthogonal subspaces, and clusters, on scikit-learn's digits (arXiv 2301.01805).

    subspace-jax train --config cluster/mlc_digits --workdir work/mlc

Variants: ``mlc`` (the default) has both phases, ``pretrain`` the first alone.

An MLP 64-256-256 with heads of width 32; 400 steps of total coding rate and 80 with memberships, 2.5 minutes of
processor time.  Figures to reach, as means over ``seed=0``, ``1``, ``2``: an accuracy of 0.88 by k-means on the
features, no less than after the first phase, and of 0.80 by spectral clustering of the memberships.  Reached: 0.891,
0.099 more than after the first phase, and 0.781: the last is missed.
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
