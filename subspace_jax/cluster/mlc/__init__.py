"""MLC: features near a union of orthogonal subspaces, and clusters, without labels (arXiv 2301.01805)."""

from subspace_jax.cluster.mlc.core import (
    average_views,
    cluster_membership,
    membership,
    membership_product,
    numerical_rank,
)
from subspace_jax.cluster.mlc.data import Jitter, Noise, curve_and_point, double_spiral
from subspace_jax.cluster.mlc.model import MLCHeads, copy_feature_head
from subspace_jax.cluster.mlc.task import MLCSettings, MLCTask, PretrainSettings, PretrainTask, start_membership

__all__ = [
    "Jitter",
    "MLCHeads",
    "MLCSettings",
    "MLCTask",
    "Noise",
    "PretrainSettings",
    "PretrainTask",
    "average_views",
    "cluster_membership",
    "copy_feature_head",
    "curve_and_point",
    "double_spiral",
    "membership",
    "membership_product",
    "numerical_rank",
    "start_membership",
]


def __dir__():
    return __all__
