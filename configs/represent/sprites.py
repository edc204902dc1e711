"""XFactors on drawn sprites: a subspace for shape and for each position, intensity unlabelled (arXiv 2601.21688).

    subspace-jax train --config represent/sprites --workdir work/sprites
    subspace-jax factors --workdir work/sprites

Variants: ``xfactors``, and ``vae`` without the contrastive terms.

Perceptrons 256-256-256, 1500 steps on 576 of 768 pictures: about half a minute on two CPU cores.  Figures to reach, for
each position: test accuracy of 5 nearest neighbours at least 0.95 in its own subspace and at most 0.25 in that of the
other; mean squared error of the reconstruction below 0.006.
"""

from subspace_jax.represent.xfactors import task

VARIANTS = ("xfactors", "vae")


def get_config(variant="xfactors"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = task.default_config()
    if variant == "vae":
        config.loss.nce_weight = 0.0
    config.train.steps = 1500
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    return config
