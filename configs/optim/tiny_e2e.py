"""LoRA on the tiny language model, from signatures of functions to their summaries, by optimizers of LoRA's factors.

    make tiny-lm
    subspace-jax finetune --config optim/tiny_e2e:adaprelora --model work/tiny/model --workdir work/e2e

Variants: ``adamw``, ``lora_plus`` (arXiv 2402.12354), ``scaled_gd_lora`` and ``scaled_adamw_lora`` (2402.02347),
``lora_rite`` (2410.20625), ``lora_pro`` (2407.18242), ``adaprelora`` (2605.08734, with the statistics of whole
gradients) and ``adaprelora_projected``.

The shape of E2E (arXiv 1706.09254) without its download: prompts are signatures of the standard library, completions
their summaries, and only these are in the loss.  The files of the split "validation" are new to the base model too.
``scripts/bench/tiny_e2e.py`` runs all variants at three learning rates each.
"""

from subspace_jax.language import finetune

# Learning rates to choose from; SGD of scaled factors has no size of its own.
RATES = {
    "adamw": (1e-3, 3e-3, 1e-2),
    "lora_plus": (3e-4, 1e-3, 3e-3),
    "scaled_gd_lora": (1e-2, 3e-2, 1e-1),
    "scaled_adamw_lora": (1e-3, 3e-3, 1e-2),
    "lora_rite": (1e-3, 3e-3, 1e-2),
    "lora_pro": (1e-3, 3e-3, 1e-2),
    "adaprelora": (1e-3, 3e-3, 1e-2),
    "adaprelora_projected": (1e-3, 3e-3, 1e-2),
}


def get_config(variant="adaprelora"):
    if variant not in RATES:
        raise ValueError(f"variant: expected one of {tuple(RATES)}, got {variant!r}")
    config = finetune.default_config()
    config.model.tokenizer = "bytes"
    config.data.source = "summaries"
    config.data.batch_size = 8
    config.data.eval_batch_size = 16
    config.adapter.method = "lora"
    config.train.steps = 200
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.optim.name = variant.removesuffix("_projected")
    config.optim.learning_rate = RATES[variant][1]
    if config.optim.name == "adaprelora":
        config.optim.kwargs = {"stats": "projected" if variant.endswith("_projected") else "full"}
    config.optim.warmup_steps = 20
    config.optim.clip_norm = 1.0
    return config
