"""Merges networks for four views of scikit-learn's digits by a learned mask (Concrete fusion, arXiv 2312.06173).

    subspace-jax train --config merge/digit_views --workdir work/digit_views

Variants: ``concrete`` (the default): a mask, trained with fixed coefficients; ``concrete_adamerging``: a mask and
layer-wise coefficients in turn, then coefficients alone; ``adamerging``: layer-wise coefficients alone.

``seed`` draws the base and the four networks.  400 steps on unlabelled test images, some seconds on two CPU cores.
Figure to reach: ``gain``, the accuracy minus that of task arithmetic, at least 0.01 for ``seed=0``, ``1``, ``2`` each.
"""

from subspace_jax.merge.subspace_fusion import task

VARIANTS = ("concrete", "concrete_adamerging", "adamerging")


def get_config(variant="concrete"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = task.default_config()
    config.model.method = "concrete_task_arithmetic" if variant == "concrete" else variant
    if variant == "adamerging":
        config.train.steps = 300
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
