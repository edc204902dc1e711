"""Deep subspace clustering of 400 of scikit-learn's digits, without labels (arXiv 2504.18179).

    subspace-jax train --config cluster/dsc_digits --workdir work/dsc
    subspace-jax train --config cluster/dsc_digits:first --workdir work/dsc_first

Variants: ``draw`` (the default) draws 40 digits of each class by ``seed``, ``first`` takes the first 40 in file order.
"""

from subspace_jax.cluster.dsc import task

VARIANTS = ("draw", "first")


def get_config(variant="draw"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = task.default_config()
    config.data.draw = variant == "draw"
    return config
