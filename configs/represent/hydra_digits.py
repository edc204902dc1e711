"""Hydra: contrastive pairs of any two classes in gated subspaces, on scikit-learn's digits (arXiv 2410.18200).

    subspace-jax train --config represent/hydra_digits:distinct --workdir work/hydra_distinct

Variants: ``arbitrary``, ``distinct`` and ``identical`` pairs with the gate; ``arbitrary_open``, ``distinct_open`` and
``identical_open`` without one.

An MLP 64-128-64, 600 steps of Adam on 1200 images: a few seconds on two CPU cores.  Figure to reach, as a mean over
``seed=0``, ``1``, ``2``: ``distinct`` 0.97 accuracy of the nearest neighbour among projections, 0.05 above
``distinct_open``.
"""

from subspace_jax.represent.hydra import task as hydra

VARIANTS = tuple(f"{kind}{gate}" for kind in ("arbitrary", "distinct", "identical") for gate in ("", "_open"))


def get_config(variant="arbitrary"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = hydra.default_config()
    kind, _, without = variant.partition("_")
    config.model.partners = kind
    config.model.gate = "open" if without else "fused"
    config.train.steps = 600
    config.train.log_every = 20
    config.train.eval_every = 100
    config.train.checkpoint_every = 300
    return config
