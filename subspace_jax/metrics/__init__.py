"""Measures of what a model has learnt: arrays or texts in, numbers out."""

from subspace_jax.metrics.class_structure import class_separation_r2, intra_class_variability
from subspace_jax.metrics.text import bleu, choice_accuracy, exact_match, final_number, perplexity, rouge_l

__all__ = [
    "bleu",
    "choice_accuracy",
    "class_separation_r2",
    "exact_match",
    "final_number",
    "intra_class_variability",
    "perplexity",
    "rouge_l",
]
