"""Do two networks learn the same: matchings, sparse maps, shared clusters, and calibrated similarities (1511.07543)."""

from subspace_jax.interpret.convergent_learning.clustering import (
    SpectralEmbedding,
    UnitClusters,
    bipartite_spectral,
    cluster_units,
    eigengap,
    ward_cluster,
)
from subspace_jax.interpret.convergent_learning.compare import (
    FAST_MEASURES,
    MEASURES,
    Null,
    Score,
    check_measures,
    compare,
    stream_moments,
)
from subspace_jax.interpret.convergent_learning.information import mutual_information_matrix
from subspace_jax.interpret.convergent_learning.layers import LayerComparison, compare_layers, read_layers
from subspace_jax.interpret.convergent_learning.matching import Matching, follow_loops, max_match, overlap, semi_match
from subspace_jax.interpret.convergent_learning.sparse import SparseMap, sparse_predict, sparse_predict_correlations
from subspace_jax.interpret.convergent_learning.statistics import (
    UnitMoments,
    between_correlation,
    unit_stats_finalize,
    unit_stats_init,
    unit_stats_update,
)

__all__ = [
    "FAST_MEASURES",
    "MEASURES",
    "LayerComparison",
    "Matching",
    "Null",
    "Score",
    "SparseMap",
    "SpectralEmbedding",
    "UnitClusters",
    "UnitMoments",
    "between_correlation",
    "bipartite_spectral",
    "check_measures",
    "cluster_units",
    "compare",
    "compare_layers",
    "eigengap",
    "follow_loops",
    "max_match",
    "mutual_information_matrix",
    "overlap",
    "read_layers",
    "semi_match",
    "sparse_predict",
    "sparse_predict_correlations",
    "stream_moments",
    "unit_stats_finalize",
    "unit_stats_init",
    "unit_stats_update",
    "ward_cluster",
]
