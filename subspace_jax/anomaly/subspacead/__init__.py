"""SubspaceAD: anomaly detection by the subspace of normal patches, without training (arXiv 2602.23013)."""

from subspace_jax.anomaly.subspacead.core import (
    METHODS,
    Moments,
    PCASubspace,
    fit_pca,
    init_moments,
    merge_moments,
    psum_moments,
    residual_score,
    solved_subspace,
    subspace_from_moments,
    tail_mean,
    update_moments,
)
from subspace_jax.anomaly.subspacead.detector import SubspaceDetector
from subspace_jax.anomaly.subspacead.files import load_subspacead, save_subspacead
from subspace_jax.anomaly.subspacead.kernel_pca import KernelSubspace, fit_kernel_pca, kernel_residual_score
from subspace_jax.anomaly.subspacead.maps import (
    AGGREGATIONS,
    anomaly_map,
    background_mask,
    image_scores,
    merge_tiles,
    tile_origins,
)
from subspace_jax.anomaly.subspacead.model import Backbone, Scored, SubspaceAD, SubspaceADSettings
from subspace_jax.anomaly.subspacead.patches import PixelPatches
from subspace_jax.anomaly.subspacead.vision import (
    VisionPatches,
    attention_saliency,
    middle_layers,
    open_vision,
    prepared_vision,
)

__all__ = [
    "AGGREGATIONS",
    "METHODS",
    "Backbone",
    "KernelSubspace",
    "Moments",
    "PCASubspace",
    "PixelPatches",
    "Scored",
    "SubspaceAD",
    "SubspaceADSettings",
    "SubspaceDetector",
    "VisionPatches",
    "anomaly_map",
    "attention_saliency",
    "background_mask",
    "fit_kernel_pca",
    "fit_pca",
    "image_scores",
    "init_moments",
    "kernel_residual_score",
    "load_subspacead",
    "merge_moments",
    "merge_tiles",
    "middle_layers",
    "open_vision",
    "prepared_vision",
    "psum_moments",
    "residual_score",
    "save_subspacead",
    "solved_subspace",
    "subspace_from_moments",
    "tail_mean",
    "tile_origins",
    "update_moments",
]
