"""Five varieties of Spanish from Django's catalogues, hidden states decoupled from that of Spain (for 2508.12803).

    pip install "subspace-jax[real]"
    subspace-jax fetch smollm2
    subspace-jax finetune --config represent/decoupling_dialects:smollm2_l01 --workdir work/dialects_l01

Variants: ``smollm2_none`` (the penalty has no weight) and ``smollm2_l01`` (weight 0.1): SmolLM2 by LoRA, 120 steps,
some minutes on two CPU cores.  With the weight, a probe of the last hidden states finds the target less often by
at least 0.02, and the validation loss is at most 0.01 higher.  ``none`` and ``l01``, with ``pretrain`` in place of
``finetune``: a Llama of 0.8 M parameters that reads bytes, from scratch.  It does not tell the dialects, so that there
is nothing to remove; see docs/methods/decoupling-probe.md.

A text is the name of a dialect, an English message and its translation, of which the loss covers the translation.
"""

from subspace_jax.language import finetune

WEIGHTS = {"none": 0.0, "l01": 0.1, "smollm2_none": 0.0, "smollm2_l01": 0.1}


def get_config(variant="l01"):
    if variant not in WEIGHTS:
        raise ValueError(f"variant: expected one of {tuple(WEIGHTS)}, got {variant!r}")
    config = finetune.default_config()
    config.data.source = "dialects"
    config.data.length = 128
    config.decoupling.target = "es"
    config.decoupling.weight = WEIGHTS[variant]
    config.optim.clip_norm = 1.0
    if variant.startswith("smollm2"):
        config.model.folder = "work/models/smollm2"
        config.data.batch_size = 2
        config.data.eval_batch_size = 8
        config.data.eval_rows = 64
        config.adapter.method = "lora"
        config.adapter.rank = 16
        config.decoupling.every = 10
        config.decoupling.per_step = 256
        config.decoupling.capacity = 8192
        config.train.steps = 120
        config.optim.learning_rate = 1e-3
    else:
        config.data.batch_size = 8
        config.data.eval_batch_size = 16
        config.decoupling.every = 50
        config.train.steps = 300
        config.optim.learning_rate = 3e-3
        config.optim.kwargs = {"weight_decay": 0.1}
    config.optim.warmup_steps = config.train.steps // 10
    config.train.eval_every = config.train.checkpoint_every = config.train.steps
    return config
