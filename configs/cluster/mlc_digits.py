"""MLC."""

from subspace_jax.cluster.mlc import task as mlc


def get_config():
    config = mlc.default_config()
    config.train.log_every = 20
    return config
