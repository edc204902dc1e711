"""Maps between an old and a new network for scikit-learn's digits (lambda-orthogonality, arXiv 2509.16664).

    subspace-jax train --config represent/compatible_digits:lam1 --workdir work/compatible

Variants: ``lam0``, ``lam05``, ``lam1``: the threshold of the backward map; ``unconstrained``: a plain affine map;
``strict``: a rotation.

The old network saw the digits 0 to 4 only, ``seed`` draws the pair; 2000 steps of Adam, about 20 seconds on two CPU
cores.  Figures to reach, as means over ``seed=0``, ``1``, ``2``: the residual within 0.15 of the threshold; CMC-1 of
new queries in the old gallery for ``lam1`` 0.03 above ``lam0``, and within the mapped gallery at most 0.03 below that
of the new network; ``unconstrained`` at least 0.05 below it.
"""

from subspace_jax.represent.lambda_orthogonality import task

VARIANTS = ("lam0", "lam05", "lam1", "unconstrained", "strict")


def get_config(variant="lam1"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = task.default_config()
    if variant == "unconstrained":
        config.model.weights = (1.0, 1.0, 0.1, 0.0)
    elif variant == "strict":
        config.model.strict = True
    else:
        config.model.lam = {"lam0": 0.0, "lam05": 0.5, "lam1": 1.0}[variant]
    config.optim.learning_rate = 0.01
    config.train.steps = 2000
    config.train.eval_every = 1000
    config.train.checkpoint_every = 1000
    return config
