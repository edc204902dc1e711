"""Ten random subspaces of R^32 with noise, which no linear classifier separates (for arXiv 2308.01547).

    subspace-jax train --config gcr/synthetic:k4 --workdir work/synthetic_k4

Variants: ``softmax``, ``k1``, ``k2``, ``k4``, ``k8``.

The head acts on the raw input; 300 steps of batch 256, about 7 seconds on two CPU cores.  Figures to reach in test
accuracy: ``k4`` 0.94 (the true subspaces score 0.978 to 0.983), and 0.25 more than ``k1``.
"""

from subspace_jax.represent.gcr import task as classify

VARIANTS = ("softmax", "k1", "k2", "k4", "k8")


def get_config(variant="k4"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "union_of_subspaces"
    config.data.batch_size = 256
    config.model.features = ()
    config.model.head = "softmax" if variant == "softmax" else "grassmann"
    config.model.dims = (1,) if variant == "softmax" else (int(variant[1:]),)
    config.optim.learning_rate = 0.1
    config.train.steps = 300
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    return config
