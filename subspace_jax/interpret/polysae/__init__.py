"""Sparse autoencoders with linear and polynomial decoders (PolySAE, arXiv 2602.01322)."""

from subspace_jax.interpret.polysae.activations import ResidualStream
from subspace_jax.interpret.polysae.core import (
    LossParts,
    SAEState,
    fold_scale,
    init_params,
    poly_sae_loss,
    poly_sae_optimizer,
)
from subspace_jax.interpret.polysae.data import Planted, planted_pairs
from subspace_jax.interpret.polysae.decoder import (
    decoder_norms,
    interaction_strength,
    linear_decode,
    linear_directions,
    poly_decode,
    poly_decode_separate,
)
from subspace_jax.interpret.polysae.evaluate import strength_and_cooccurrence
from subspace_jax.interpret.polysae.model import PolySAE, PolySAEOutput
from subspace_jax.interpret.polysae.retraction import qr_positive, stiefel_retract
from subspace_jax.interpret.polysae.settings import PolySAEConfig, default_widths
from subspace_jax.interpret.polysae.sparsify import (
    SparseCode,
    auxk_code,
    batch_topk,
    jumprelu,
    step_fn,
    topk,
    topk_code,
)
from subspace_jax.interpret.polysae.task import PolySAETask

__all__ = [
    "LossParts",
    "Planted",
    "PolySAE",
    "PolySAEConfig",
    "PolySAEOutput",
    "PolySAETask",
    "ResidualStream",
    "SAEState",
    "SparseCode",
    "auxk_code",
    "batch_topk",
    "decoder_norms",
    "default_widths",
    "fold_scale",
    "init_params",
    "interaction_strength",
    "jumprelu",
    "linear_decode",
    "linear_directions",
    "planted_pairs",
    "poly_decode",
    "poly_decode_separate",
    "poly_sae_loss",
    "poly_sae_optimizer",
    "qr_positive",
    "step_fn",
    "stiefel_retract",
    "strength_and_cooccurrence",
    "topk",
    "topk_code",
]


def __dir__():
    return __all__
