"""Metrics: arrays or texts in, numbers out."""

from subspace_jax.metrics.backfill import backfill_curve, update_gain
from subspace_jax.metrics.class_structure import class_separation_r2, intra_class_variability
from subspace_jax.metrics.intrinsic_dimension import d_int, d_int_bootstrap, mdl_bits, search_d_int
from subspace_jax.metrics.retrieval import cmc, recall_at_k, retrieval_map
from subspace_jax.metrics.text import bleu, choice_accuracy, exact_match, final_number, perplexity, rouge_l

__all__ = [
    "backfill_curve",
    "bleu",
    "choice_accuracy",
    "class_separation_r2",
    "cmc",
    "d_int",
    "d_int_bootstrap",
    "exact_match",
    "final_number",
    "intra_class_variability",
    "mdl_bits",
    "perplexity",
    "recall_at_k",
    "retrieval_map",
    "rouge_l",
    "search_d_int",
    "update_gain",
]


def __dir__():
    return __all__
