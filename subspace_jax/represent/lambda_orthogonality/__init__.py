"""Lambda-orthogonality: vectors of a new model that stay compatible with a store of old ones (arXiv 2509.16664)."""

from subspace_jax.represent.lambda_orthogonality.core import (
    Affine,
    CompatParams,
    CompatSettings,
    backfill_order,
    backfill_scores,
    class_means,
    compat_loss,
)
from subspace_jax.represent.lambda_orthogonality.maps import Chain, Link, joined, map_backward, map_forward
from subspace_jax.represent.lambda_orthogonality.model import AffineAdapter, CompatAdapters, OrthogonalAdapter
from subspace_jax.represent.lambda_orthogonality.predict import Prediction, check_chain
from subspace_jax.represent.lambda_orthogonality.task import CompatTask
from subspace_jax.represent.lambda_orthogonality.upgrade import (
    UpgradeSettings,
    fit_upgrade,
    load_maps,
    map_store,
    save_maps,
)

__all__ = [
    "Affine",
    "AffineAdapter",
    "Chain",
    "CompatAdapters",
    "CompatParams",
    "CompatSettings",
    "CompatTask",
    "Link",
    "OrthogonalAdapter",
    "Prediction",
    "UpgradeSettings",
    "backfill_order",
    "backfill_scores",
    "check_chain",
    "class_means",
    "compat_loss",
    "fit_upgrade",
    "joined",
    "load_maps",
    "map_backward",
    "map_forward",
    "map_store",
    "save_maps",
]


def __dir__():
    return __all__
