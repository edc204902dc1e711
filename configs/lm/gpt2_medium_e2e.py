"""GPT-2 medium, all parameters fine-tuned on the restaurant descriptions of E2E (arXiv 1706.09254).

    subspace-jax finetune --config lm/gpt2_medium_e2e --model DIR --workdir work/e2e
    subspace-jax finetune --config lm/gpt2_medium_e2e --model DIR --workdir work/e2e --config.data.source=gem/e2e_nlg

DIR is a Hugging Face folder with its tokenizer.  TFDS prepares the set once, with network: ``tfds build e2e_cleaned``.
Prompts are meaning representations, completions their descriptions; only completions are in the loss.  Five epochs,
batch 8, AdamW with decay 0.01 and 500 warm-up steps are those of the adapter literature (arXiv 2106.09685); the
learning rate is for all parameters, which need a smaller one than adapters.
"""

from subspace_jax.language import finetune


def get_config():
    config = finetune.default_config()
    config.model.size = "gpt2-medium"
    config.model.dtype = "bfloat16"
    config.data.source = "e2e_cleaned"
    config.data.length = 512
    config.data.batch_size = 8
    config.data.eval_batch_size = 8
    config.train.epochs = 5.0
    config.optim.learning_rate = 5e-5
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 500
    config.optim.kwargs = {"weight_decay": 0.01}
    config.optim.clip_norm = 1.0
    return config
