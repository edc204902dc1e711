"""Language modelling: causal models trained on text, from nothing or from a checkpoint folder."""

from subspace_jax.language.causal_lm import CausalLMTask, option_scores, score_rows, token_nll
from subspace_jax.language.finetune import build, default_config, export, model_of, texts_of

__all__ = [
    "CausalLMTask",
    "build",
    "default_config",
    "export",
    "model_of",
    "option_scores",
    "score_rows",
    "texts_of",
    "token_nll",
]
