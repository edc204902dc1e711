"""Sparse autoencoders of SmolLM2-135M-Instruct: the residual stream after layer 15, on docstrings.

    subspace-jax fetch smollm2
    subspace-jax sae --config interpret/sae_smollm2:topk --workdir work/sae_smollm2

Variants: ``topk``, a linear decoder; ``polysae``, a polynomial one of order 3; both with TopK and 32 of 4,096 features;
``batchtopk`` and ``matryoshka``, polynomial.

1,200 steps of 8 rows of 128 tokens from the docstrings of the standard library; a step takes some 1.6 seconds of
processor time.
"""

from subspace_jax.interpret.polysae import run

VARIANTS = ("topk", "polysae", "batchtopk", "matryoshka")


def get_config(variant="topk"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = run.default_config()
    config.model.folder = "work/models/smollm2"
    config.model.layer = 15
    config.model.decoder = "linear" if variant == "topk" else "shared"
    config.model.sparsifier = variant if variant in ("batchtopk", "matryoshka") else "topk"
    config.model.ranks = (576, 64, 64)
    config.model.d_sae = 4096
    config.model.k = 32.0
    # Features that rest for a share of this short run are revived.
    config.model.dead_after = 100
    config.data.eval_rows = 64
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 50
    config.train.steps = 1200
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.train.log_every = 20
    return config
