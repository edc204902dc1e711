"""A classifier on a synthetic mixture of three domains, its codes decoupled from the dominant one (for 2508.12803).

    subspace-jax train --config represent/decoupling_synthetic:l01 --workdir work/decoupling_l01

Variants: ``none`` (the penalty has no weight), ``l001`` (weight 0.01), ``l01`` (0.1), and as a control ``random`` (0.1,
on random subspaces).

An encoder 32-64-32 and a head for five classes, 600 steps of 2000 examples, the subspace estimated every 50 of them:
about 15 seconds on two CPU cores.  Figures to reach: a fresh probe for the dominant domain on the codes loses at least
0.2 of balanced accuracy against ``none`` at weights up to 0.1, with a task accuracy of at least 0.98, and ends at least
0.1 below ``random``.
"""

from subspace_jax.represent.decoupling_probe import task

WEIGHTS = {"none": 0.0, "l001": 0.01, "l01": 0.1, "random": 0.1}


def get_config(variant="l01"):
    if variant not in WEIGHTS:
        raise ValueError(f"variant: expected one of {tuple(WEIGHTS)}, got {variant!r}")
    config = task.default_config()
    config.decoupling.weight = WEIGHTS[variant]
    config.decoupling.mode = "random" if variant == "random" else "target"
    config.decoupling.every = 50
    config.decoupling.capacity = 2000
    config.decoupling.per_step = 2000
    config.train.steps = 600
    config.train.eval_every = 600
    config.train.checkpoint_every = 300
    return config
