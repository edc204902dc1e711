"""The intrinsic dimension of a network for scikit-learn's digits (arXiv 1804.08838).

    subspace-jax intrinsic-dimension --config optim/intrinsic_digits --workdir work/digits_dim

Variants: ``fastfood``, ``dense``, ``sparse``, ``said``: how subspaces are drawn.

A network 64-64-10 with 4810 parameters, 300 steps of Adam on all 1200 images, two runs of each dimension: about a
minute on two CPU cores.  Figure to reach: d_int90 between 100 and 170 (130 is usual).
"""

from subspace_jax.interpret.intrinsic_dimension import fully_connected

VARIANTS = ("fastfood", "dense", "sparse", "said")


def get_config(variant="fastfood"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = fully_connected.default_config()
    config.data.batch_size = 1200
    config.optim.learning_rate = 0.1
    config.train.steps = 300
    config.intrinsic.method = variant
    config.intrinsic.dims = (20, 40, 60, 80, 100, 130, 160, 200)
    config.intrinsic.repeats = 2
    config.intrinsic.full_learning_rate = 0.01
    return config
