"""Deep subspace clustering of 400 of scikit-learn's digits, without labels (arXiv 2504.18179).

    subspace-jax train --config cluster/dsc_digits --workdir work/dsc
    subspace-jax train --config cluster/dsc_digits:first --workdir work/dsc_first

Variants: ``uniform`` (the default) draws 400 digits by ``seed``, ``balanced`` 40 of each class, ``first`` takes the
first 40 of each class in file order.

Half a minute of processor time.  Figures to reach: over ``seed=0``, ``1``, ``2`` of ``uniform`` a mean ``gain`` in
accuracy over k-means of 0.04, each run stopped by itself; of ``first`` an accuracy of 0.85 and an NMI of 0.83.
"""

from subspace_jax.cluster.dsc import task

VARIANTS = ("uniform", "balanced", "first")


def get_config(variant="uniform"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = task.default_config()
    config.data.draw = variant
    return config
