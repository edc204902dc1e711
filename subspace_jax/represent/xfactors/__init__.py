"""XFactors: an autoencoder with a subspace for each labelled factor (arXiv 2601.21688)."""

from subspace_jax.represent.xfactors.core import (
    Codes,
    Outputs,
    SubspaceLayout,
    XFactorsConfig,
    factor_infonce,
    xfactors_loss,
)
from subspace_jax.represent.xfactors.data import FactorImages, openmoji, sprites
from subspace_jax.represent.xfactors.evaluate import (
    FactorScores,
    boosted_importance,
    factor_scores,
    forest_importance,
)
from subspace_jax.represent.xfactors.model import (
    ConvDecoder,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    XFactors,
    decode,
    encode,
    make_xfactors,
    swap_factor,
)
from subspace_jax.represent.xfactors.pictures import Trained, draw_generated, draw_swaps, open_trained
from subspace_jax.represent.xfactors.task import XFactorsTask

__all__ = [
    "Codes",
    "ConvDecoder",
    "ConvEncoder",
    "FactorImages",
    "FactorScores",
    "MLPDecoder",
    "MLPEncoder",
    "Outputs",
    "SubspaceLayout",
    "Trained",
    "XFactors",
    "XFactorsConfig",
    "XFactorsTask",
    "boosted_importance",
    "decode",
    "draw_generated",
    "draw_swaps",
    "encode",
    "factor_infonce",
    "factor_scores",
    "forest_importance",
    "make_xfactors",
    "open_trained",
    "openmoji",
    "sprites",
    "swap_factor",
    "xfactors_loss",
]


def __dir__():
    return __all__
