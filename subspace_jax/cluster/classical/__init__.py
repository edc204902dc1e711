"""Classical subspace clustering: self-expression, thresholding, and graphs of neighbours."""

from subspace_jax.cluster.classical.affinity import (
    affinity_from_coefficients,
    keep_top_coefficients,
    neighbor_affinity,
)
from subspace_jax.cluster.classical.elastic_net import ElasticNet, elastic_net_sc
from subspace_jax.cluster.classical.estimators import KMeans, KSubspaces
from subspace_jax.cluster.classical.graph_estimators import (
    LRR,
    LSR,
    SSC,
    SSCOMP,
    TSC,
    RobustLRR,
    SpectralClustering,
)
from subspace_jax.cluster.classical.omp import ssc_omp
from subspace_jax.cluster.classical.robust import RobustLowRank, lrr_l21
from subspace_jax.cluster.classical.tsc import tsc
from subspace_jax.linalg import lrr, lsr

__all__ = [
    "LRR",
    "LSR",
    "SSC",
    "SSCOMP",
    "TSC",
    "ElasticNet",
    "KMeans",
    "KSubspaces",
    "RobustLRR",
    "RobustLowRank",
    "SpectralClustering",
    "affinity_from_coefficients",
    "elastic_net_sc",
    "keep_top_coefficients",
    "lrr",
    "lrr_l21",
    "lsr",
    "neighbor_affinity",
    "ssc_omp",
    "tsc",
]


def __dir__():
    return __all__
