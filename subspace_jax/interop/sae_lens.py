"""Folders of SAELens: ``cfg.json`` and ``sae_weights.safetensors`` of a sparse autoencoder with a linear decoder."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from subspace_jax.data.json_object import read_json_object
from subspace_jax.interop.config_fields import shown
from subspace_jax.interop.safetensors_io import StoredTensor, read_header, write_safetensors
from subspace_jax.interop.writing import replacing

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("topk", "jumprelu", "standard")
_IDENTITY = {"normalize_activations": "none", "reshape_activations": "none"}


class LinearSAE(NamedTuple):
    """A sparse autoencoder ``z = S((x - b_dec) W_enc + b_enc)``, ``x = z W_dec + b_dec``.

    Attributes:
      w_enc: ``[d, m]``.
      b_enc: ``[m]``.
      w_dec: ``[m, d]``.
      b_dec: ``[d]``.
      k: Entries that TopK keeps; None for a code by thresholds.
      threshold: Thresholds ``[m]`` above which an entry is kept, 0 for a plain ReLU; None with TopK.
      metadata: What else SAELens says of it: ``model_name``, ``hook_name``, ...
    """

    w_enc: np.ndarray
    b_enc: np.ndarray
    w_dec: np.ndarray
    b_dec: np.ndarray
    k: int | None = None
    threshold: np.ndarray | None = None
    metadata: Mapping[str, Any] = {}


def save_sae(folder: str | os.PathLike, sae: LinearSAE, *, overwrite: bool = False) -> None:
    """Writes a folder that ``sae_lens.SAE.load_from_disk`` reads.

    TopK is written as such, a code by thresholds as "jumprelu".  Weights are float32.

    Args:
      folder: The folder.
      sae: The autoencoder.
      overwrite: Whether to replace what is in it.

    Raises:
      FileExistsError: The folder holds something, without ``overwrite``.
      ValueError: Shapes don't fit, or there are both k and thresholds, or neither.
    """
    _check(sae)
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists; pass overwrite=True to replace the autoencoder in it")
    d, m = sae.w_enc.shape
    fields = {"architecture": "jumprelu" if sae.k is None else "topk", "d_in": d, "d_sae": m, "dtype": "float32"}
    fields |= {"device": "cpu", "apply_b_dec_to_input": True, **_IDENTITY, "metadata": dict(sae.metadata)}
    if sae.k is not None:
        fields |= {"k": int(sae.k), "rescale_acts_by_decoder_norm": False}
    tensors = {"W_enc": sae.w_enc, "b_enc": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    if sae.k is None:
        tensors["threshold"] = sae.threshold
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    with replacing(folder, lambda name: name in (_CONFIG, _WEIGHTS)) as new:
        (new / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        write_safetensors(new / _WEIGHTS, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.values())


def load_sae(folder: str | os.PathLike) -> LinearSAE:
    """Reads a folder of SAELens with the architecture "topk", "jumprelu" or "standard".

    What a field folds into the weights exactly is folded: a bias that is not subtracted from the input, and codes that
    are rescaled by norms of the decoder.

    Args:
      folder: Folder with ``cfg.json`` and ``sae_weights.safetensors``.

    Raises:
      FileNotFoundError: The folder or a file is not there.
      ValueError: The architecture or a normalization of activations is not supported, or a tensor is missing or of
        another shape; the file is named.
    """
    folder = pathlib.Path(folder).expanduser()
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected a folder that SAELens wrote")
    file = folder / _CONFIG
    fields = read_json_object(file)
    architecture = fields.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{file}: architecture: expected one of {ARCHITECTURES}, got {shown(architecture)}")
    for name, only in _IDENTITY.items():
        if fields.get(name, only) != only:
            raise ValueError(f"{file}: {name}: expected {only!r}, got {shown(fields[name])}, which is not supported")
    stored = read_header(folder / _WEIGHTS)[0]
    d, m = fields.get("d_in"), fields.get("d_sae")
    shapes = {"W_enc": (d, m), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
    if architecture == "jumprelu":
        shapes["threshold"] = (m,)
    arrays = {name: _read(folder / _WEIGHTS, stored, name, shape) for name, shape in shapes.items()}
    w_enc, b_enc, w_dec, b_dec = (arrays[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    if not fields.get("apply_b_dec_to_input", True):
        b_enc = b_enc + b_dec @ w_enc
    k = fields.get("k") if architecture == "topk" else None
    if architecture == "topk" and (not isinstance(k, int) or not 1 <= k <= m):
        raise ValueError(f"{file}: k: expected an integer from 1 to {m}, got {shown(k)}")
    if fields.get("rescale_acts_by_decoder_norm", False):
        norms = np.linalg.norm(w_dec, axis=1)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    threshold = None if k is not None else arrays.get("threshold", np.zeros(m, np.float32))
    return LinearSAE(w_enc, b_enc, w_dec, b_dec, k, threshold, fields.get("metadata") or {})


def _read(file: pathlib.Path, stored: Mapping[str, StoredTensor], name: str, shape: tuple) -> np.ndarray:
    if name not in stored:
        raise ValueError(f"{file}: expected a tensor {name}, got {sorted(stored)}")
    if stored[name].shape != shape:
        raise ValueError(f"{file}: {name}: expected {list(shape)}, as cfg.json says, got {list(stored[name].shape)}")
    return np.asarray(stored[name].read(), np.float32)


def _check(sae: LinearSAE) -> None:
    d, m = sae.w_enc.shape
    for name, shape in (("b_enc", (m,)), ("w_dec", (m, d)), ("b_dec", (d,))):
        if getattr(sae, name).shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(getattr(sae, name).shape)}")
    if (sae.k is None) == (sae.threshold is None):
        raise ValueError("k, threshold: expected one of the two")
    if sae.threshold is not None and sae.threshold.shape != (m,):
        raise ValueError(f"threshold: expected [{m}], got {list(sae.threshold.shape)}")
