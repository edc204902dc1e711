"""SmolLM2-135M-Instruct, fine-tuned by adapters on the docstrings of the standard library.

    subspace-jax fetch smollm2
    subspace-jax finetune --config lm/smollm2:lora --workdir work/smollm2

Variants: ``lora`` and ``dora`` (with AdamW), ``lora_rite`` and ``adaprelora`` (LoRA with these optimizers), all of rank
16; ``base`` only evaluates the model, for comparison.

60 steps of 2 rows of 128 tokens, some minutes on two CPU cores.  The loss on 96 rows of the validation split, in nats a
token, must end below that of the model as it is.
"""

from subspace_jax.language import finetune

VARIANTS = ("lora", "dora", "lora_rite", "adaprelora", "base")


def get_config(variant="lora"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = finetune.default_config()
    config.model.folder = "work/models/smollm2"
    config.data.length = 128
    config.data.batch_size = 2
    config.data.eval_batch_size = 8
    config.data.eval_rows = 96
    config.adapter.method = "dora" if variant == "dora" else "lora"
    config.adapter.rank = 16
    # A new adapter changes nothing, and at a learning rate of 0 it stays so.
    config.train.steps = 1 if variant == "base" else 60
    config.train.eval_every = config.train.steps
    config.train.checkpoint_every = 60
    config.train.log_every = 5
    config.optim.learning_rate = 0.0 if variant == "base" else 1e-3
    if variant in ("lora_rite", "adaprelora"):
        config.optim.name = variant
    if variant == "adaprelora":
        config.optim.kwargs = {"stats": "projected"}
    config.optim.warmup_steps = config.train.steps // 10
    config.optim.schedule = "linear"
    config.optim.clip_norm = 1.0
    return config
