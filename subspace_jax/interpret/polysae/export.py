"""Autoencoders with a linear decoder in the format of SAELens."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from subspace_jax import interop
from subspace_jax.interpret.polysae.core import fold_scale
from subspace_jax.interpret.polysae.decoder import decoder_norms
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.study import Trained


def export_sae_lens(folder: str | os.PathLike, trained: Trained, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes an autoencoder for SAELens, scale, center and norms of the decoder folded into its weights.

    BatchTopK becomes a JumpReLU with its threshold, as at inference.  What is in the folder is replaced.

    Args:
      folder: The folder.
      trained: The autoencoder.
      metadata: ``model_name``, ``hook_name`` and what else SAELens keeps.

    Raises:
      ValueError: The decoder is polynomial, for which the format has no place.
    """
    config, params = trained.config, trained.params
    if config.decoder != "linear":
        raise ValueError(f"decoder: the format of SAELens holds linear ones, got {config.decoder!r}")
    norms = np.asarray(decoder_norms(config, params)) if config.rescale else np.ones(config.d_sae, np.float32)
    own = {name: np.asarray(x) for name, x in fold_scale(params, trained.scale, trained.center).items()}
    thresholds = None
    if config.sparsifier == "jumprelu":
        thresholds = np.exp(own["log_theta"])
    elif config.whole_batch:
        thresholds = np.full(config.d_sae, trained.threshold, np.float32)
    sae = interop.LinearSAE(
        own["W_enc"] * norms,
        own["b_enc"] * norms,
        own["W_dec"] / norms[:, None],
        own["b_dec"],
        None if thresholds is not None else int(config.k),
        thresholds,
        metadata or {},
    )
    interop.save_sae(folder, sae, overwrite=True)


def import_sae_lens(folder: str | os.PathLike) -> tuple[PolySAEConfig, dict[str, np.ndarray]]:
    """Reads an autoencoder of SAELens as one with a linear decoder.

    Thresholds of 0, of a plain ReLU, become the least positive number.  What is raised: see
    :func:`subspace_jax.interop.load_sae`.

    Returns:
      The autoencoder, with TopK or JumpReLU, and its parameters.
    """
    sae = interop.load_sae(folder)
    params = {"W_enc": sae.w_enc, "b_enc": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    d, m = sae.w_enc.shape
    if sae.k is not None:
        return PolySAEConfig(d, m, sae.k, decoder="linear"), params
    least = np.finfo(np.float32).tiny
    params["log_theta"] = np.log(np.maximum(sae.threshold, least)).astype(np.float32)
    return PolySAEConfig(d, m, m, decoder="linear", sparsifier="jumprelu"), params
