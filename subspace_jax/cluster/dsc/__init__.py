"""Deep subspace clustering without labels or tuning (arXiv 2504.18179)."""

from subspace_jax.cluster.dsc.core import (
    column_affinity,
    distance_preserving_loss,
    lsr_coefficients,
    reconstruction_loss,
    relative_stop,
    self_expression_loss,
    spectral_labels,
    subspace_structured_loss,
)
from subspace_jax.cluster.dsc.data import LabelledImages, open_images, subspace_images, unit_images
from subspace_jax.cluster.dsc.images import DSCResult, fit, predict
from subspace_jax.cluster.dsc.model import ConvAutoencoder
from subspace_jax.cluster.dsc.phases import Autoencoding, ExpressionOptions, SelfExpression, Structured
from subspace_jax.cluster.dsc.task import default_config

__all__ = [
    "Autoencoding",
    "ConvAutoencoder",
    "DSCResult",
    "ExpressionOptions",
    "LabelledImages",
    "SelfExpression",
    "Structured",
    "column_affinity",
    "default_config",
    "distance_preserving_loss",
    "fit",
    "lsr_coefficients",
    "open_images",
    "predict",
    "reconstruction_loss",
    "relative_stop",
    "self_expression_loss",
    "spectral_labels",
    "subspace_images",
    "subspace_structured_loss",
    "unit_images",
]


def __dir__():
    return __all__
