"""Language modelling: causal models trained on text, from nothing or from a checkpoint folder, whole or by adapters."""

from subspace_jax.language.adapted import AdaptedLMTask, default_targets
from subspace_jax.language.causal_lm import CausalLMTask, option_scores, score_rows, token_nll
from subspace_jax.language.decoupled import DecoupledLMTask
from subspace_jax.language.finetune import (
    build,
    default_config,
    export,
    is_peft,
    load_adapted,
    merge_adapter,
    model_of,
)
from subspace_jax.language.texts import texts_of, trains_on_conversations

__all__ = [
    "AdaptedLMTask",
    "CausalLMTask",
    "DecoupledLMTask",
    "build",
    "default_config",
    "default_targets",
    "export",
    "is_peft",
    "load_adapted",
    "merge_adapter",
    "model_of",
    "option_scores",
    "score_rows",
    "texts_of",
    "token_nll",
    "trains_on_conversations",
]


def __dir__():
    return __all__
