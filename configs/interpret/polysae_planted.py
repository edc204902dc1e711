"""A polynomial decoder of planted activations, of which three pairs of features interact (PolySAE, arXiv 2602.01322).

    subspace-jax train --config interpret/polysae_planted:order2 --workdir work/planted

Variants: ``order1``, a linear decoder; ``order2`` and ``order3``.

The true codes are given, ``seed`` draws the activations; 3000 steps, about 10 seconds on two CPU cores.  Figures to
reach for ``seed=0``, ``1`` and ``2``: order 1 leaves more than a tenth of the variance, order 2 less than 0.02, and the
planted pairs are the three strongest interactions.
"""

from subspace_jax.interpret.polysae import planted

VARIANTS = ("order1", "order2", "order3")


def get_config(variant="order2"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = planted.default_config()
    config.model.order = int(variant[-1])
    config.train.steps = 3000
    config.train.eval_every = 3000
    config.train.checkpoint_every = 3000
    config.train.log_every = 500
    return config
