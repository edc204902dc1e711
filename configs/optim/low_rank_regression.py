"""Optimizers of LoRA's factors on a regression onto a matrix of rank 4 whose rows and columns differ in scale.

    subspace-jax train --config optim/low_rank_regression:adaprelora --workdir work/adaprelora

Variants: ``adaprelora`` (arXiv 2605.08734, with the energies of the true gradient), ``adaprelora_projected``, ``adam``,
``lora_plus``, ``scaled_adamw_lora``, ``lora_rite`` and ``lora_pro``.

400 steps, some seconds; ``relative`` is the loss as a fraction of that at the start.  Figures to reach with
``adaprelora``, medians over ``seed=0`` to ``4``: 1e-8 with ``model.rank=4``; 1e-5 with ``model.rank=8``, 100 times
below ``scaled_adamw_lora``.
"""

from examples import low_rank_regression

VARIANTS = {
    "adaprelora": ("adaprelora", 0.1, {"scale": 1.0, "stats": "full"}),
    "adaprelora_projected": ("adaprelora", 0.1, {"scale": 1.0, "stats": "projected"}),
    "adam": ("adam", 0.1, {}),
    "lora_plus": ("lora_plus", 0.03, {}),
    "scaled_adamw_lora": ("scaled_adamw_lora", 0.1, {}),
    "lora_rite": ("lora_rite", 0.1, {}),
    "lora_pro": ("lora_pro", 0.03, {"scale": 1.0}),
}


def get_config(variant="adaprelora"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {tuple(VARIANTS)}, got {variant!r}")
    config = low_rank_regression.default_config()
    config.optim.name, config.optim.learning_rate, config.optim.kwargs = VARIANTS[variant]
    config.train.eval_every = config.train.checkpoint_every = 400
    return config
