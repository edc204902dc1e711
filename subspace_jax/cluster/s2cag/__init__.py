"""S2CAG: spectral subspace clustering of attributed graphs."""

from subspace_jax.cluster.s2cag.attributes import normalize_attributes, tfidf
from subspace_jax.cluster.s2cag.core import Options, S2CAGResult, m_s2cag, s2cag
from subspace_jax.cluster.s2cag.embedding import modularity_embedding, randomized_left_svd
from subspace_jax.cluster.s2cag.estimator import S2CAG
from subspace_jax.cluster.s2cag.graph import GraphOperator, normalize_adjacency
from subspace_jax.cluster.s2cag.rounding import round_embedding, snem_round
from subspace_jax.cluster.s2cag.smoothing import Smoothed, choose_path, smooth, smooth_operator

__all__ = [
    "S2CAG",
    "GraphOperator",
    "Options",
    "S2CAGResult",
    "Smoothed",
    "choose_path",
    "m_s2cag",
    "modularity_embedding",
    "normalize_adjacency",
    "normalize_attributes",
    "randomized_left_svd",
    "round_embedding",
    "s2cag",
    "smooth",
    "smooth_operator",
    "snem_round",
    "tfidf",
]


def __dir__():
    return __all__
