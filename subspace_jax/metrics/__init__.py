"""Metrics: arrays or texts in, numbers out."""

from subspace_jax.metrics.class_structure import class_separation_r2, intra_class_variability
from subspace_jax.metrics.disentanglement import (
    factor_entropy,
    histogram_discretize,
    mig,
    modularity,
    mutual_information_matrix,
    sap_continuous,
    sap_from_scores,
)
from subspace_jax.metrics.disentanglement_dci import DCI, dci_from_importance, dci_scores, l1_importance
from subspace_jax.metrics.disentanglement_votes import (
    FactorVAEScore,
    factor_vae_from_votes,
    factor_vae_score,
    factor_vae_votes,
)
from subspace_jax.metrics.intrinsic_dimension import d_int, d_int_bootstrap, mdl_bits, search_d_int
from subspace_jax.metrics.retrieval import cmc, recall_at_k, retrieval_map
from subspace_jax.metrics.text import bleu, choice_accuracy, exact_match, final_number, perplexity, rouge_l

__all__ = [
    "DCI",
    "FactorVAEScore",
    "bleu",
    "choice_accuracy",
    "class_separation_r2",
    "cmc",
    "d_int",
    "d_int_bootstrap",
    "dci_from_importance",
    "dci_scores",
    "exact_match",
    "factor_entropy",
    "factor_vae_from_votes",
    "factor_vae_score",
    "factor_vae_votes",
    "final_number",
    "histogram_discretize",
    "intra_class_variability",
    "l1_importance",
    "mdl_bits",
    "mig",
    "modularity",
    "mutual_information_matrix",
    "perplexity",
    "recall_at_k",
    "retrieval_map",
    "rouge_l",
    "sap_continuous",
    "sap_from_scores",
    "search_d_int",
]


def __dir__():
    return __all__
