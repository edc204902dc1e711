"""Metrics: arrays or texts in, numbers out."""

from subspace_jax.metrics.anomaly import aupro, auroc, average_precision, best_f1_threshold
from subspace_jax.metrics.anomaly_histogram import (
    PixelHistogram,
    PixelScores,
    init_pixel_histogram,
    merge_pixel_histograms,
    pixel_scores,
    update_pixel_histogram,
)
from subspace_jax.metrics.backfill import backfill_curve, update_gain
from subspace_jax.metrics.chamfer import chamfer_distance
from subspace_jax.metrics.cka import cka, median_sigma, unbiased_cka
from subspace_jax.metrics.class_structure import class_separation_r2, intra_class_variability
from subspace_jax.metrics.clustering import match_assignments, normalized_mutual_info
from subspace_jax.metrics.continual import (
    average_accuracy,
    backward_transfer,
    final_accuracy,
    forgetting,
    forward_transfer,
    mtil_metrics,
)
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
from subspace_jax.metrics.domain_gap import coral, frechet_distance, mean_gap, mmd2, proxy_a_distance
from subspace_jax.metrics.graph_partitions import graph_conductance, graph_modularity
from subspace_jax.metrics.intrinsic_dimension import d_int, d_int_bootstrap, mdl_bits, search_d_int
from subspace_jax.metrics.kernel_alignment import hsic, kernel_cka, linear_cka, rbf_kernel, unbiased_hsic
from subspace_jax.metrics.neighbor_agreement import cknna, clip_outliers, cycle_knn, lcs_knn, mutual_knn
from subspace_jax.metrics.partitions import (
    ClusterScores,
    PairFScore,
    adjusted_mutual_info,
    adjusted_rand_index,
    best_label_map,
    cluster_scores,
    clustering_accuracy,
    contingency,
    matched_macro_f1,
    pair_f_score,
    purity,
)
from subspace_jax.metrics.representation_similarity import (
    cca_mean,
    linear_regression_r2,
    procrustes_similarity,
    pwcca,
    svcca,
)
from subspace_jax.metrics.retrieval import cmc, recall_at_k, retrieval_map
from subspace_jax.metrics.self_expression import (
    SubspaceMatch,
    connectivity,
    match_subspaces,
    subspace_preserving_error,
)
from subspace_jax.metrics.separability import balanced_probe_accuracy
from subspace_jax.metrics.sparse_codes import cooccurrence, explained_variance, mean_wasserstein1, sparse_probe_f1
from subspace_jax.metrics.text import bleu, choice_accuracy, exact_match, final_number, perplexity, rouge_l

__all__ = [
    "DCI",
    "ClusterScores",
    "FactorVAEScore",
    "PairFScore",
    "PixelHistogram",
    "PixelScores",
    "SubspaceMatch",
    "adjusted_mutual_info",
    "adjusted_rand_index",
    "aupro",
    "auroc",
    "average_accuracy",
    "average_precision",
    "backfill_curve",
    "backward_transfer",
    "balanced_probe_accuracy",
    "best_f1_threshold",
    "best_label_map",
    "bleu",
    "cca_mean",
    "chamfer_distance",
    "choice_accuracy",
    "cka",
    "cknna",
    "class_separation_r2",
    "clip_outliers",
    "cluster_scores",
    "clustering_accuracy",
    "cmc",
    "connectivity",
    "contingency",
    "cooccurrence",
    "coral",
    "cycle_knn",
    "d_int",
    "d_int_bootstrap",
    "dci_from_importance",
    "dci_scores",
    "exact_match",
    "explained_variance",
    "factor_entropy",
    "factor_vae_from_votes",
    "factor_vae_score",
    "factor_vae_votes",
    "final_accuracy",
    "final_number",
    "forgetting",
    "forward_transfer",
    "frechet_distance",
    "graph_conductance",
    "graph_modularity",
    "histogram_discretize",
    "hsic",
    "init_pixel_histogram",
    "intra_class_variability",
    "kernel_cka",
    "l1_importance",
    "lcs_knn",
    "linear_cka",
    "linear_regression_r2",
    "match_assignments",
    "match_subspaces",
    "matched_macro_f1",
    "mdl_bits",
    "mean_gap",
    "mean_wasserstein1",
    "median_sigma",
    "merge_pixel_histograms",
    "mig",
    "mmd2",
    "modularity",
    "mtil_metrics",
    "mutual_information_matrix",
    "mutual_knn",
    "normalized_mutual_info",
    "pair_f_score",
    "perplexity",
    "pixel_scores",
    "procrustes_similarity",
    "proxy_a_distance",
    "purity",
    "pwcca",
    "rbf_kernel",
    "recall_at_k",
    "retrieval_map",
    "rouge_l",
    "sap_continuous",
    "sap_from_scores",
    "search_d_int",
    "sparse_probe_f1",
    "subspace_preserving_error",
    "svcca",
    "unbiased_cka",
    "unbiased_hsic",
    "update_gain",
    "update_pixel_histogram",
]


def __dir__():
    return __all__
