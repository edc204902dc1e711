"""A fitted model on disk: safetensors and JSON."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax import interop, train
from subspace_jax.anomaly.subspacead.core import Moments
from subspace_jax.anomaly.subspacead.model import Backbone, SubspaceAD, SubspaceADSettings
from subspace_jax.anomaly.subspacead.patches import PixelPatches

ARRAYS, RECORD = "subspacead.safetensors", "subspacead.json"


def save_subspacead(model: SubspaceAD, folder: str | os.PathLike, **record: Any) -> None:
    """Writes the moments and settings of a fitted model; parameters of a backbone are not written.

    Args:
      model: The model.
      folder: Folder to write to.
      **record: Further fields of the JSON.

    Raises:
      ValueError: The model is not fitted.
      OSError: The folder can't be written.
    """
    if model.moments is None:
        raise ValueError("model: expected a fitted one; call fit first")
    folder = train.writable_folder(folder)
    arrays = {name: np.asarray(x) for name, x in model.moments._asdict().items()}
    with train.replacing(folder / ARRAYS) as partial:
        interop.write_safetensors(partial, {n: (x.shape, x.dtype) for n, x in arrays.items()}, arrays.values())
    described = {"backbone": _described(model.backbone), "settings": dataclasses.asdict(model.settings)}
    with train.replacing(folder / RECORD) as partial:
        partial.write_text(json.dumps(described | {"rank": int(model.subspace.rank)} | record, indent=2) + "\n")


def load_subspacead(
    folder: str | os.PathLike, backbone: Backbone | None = None, params: Any = (), **options: Any
) -> SubspaceAD:
    """Reads what :func:`save_subspacead` wrote.

    Args:
      folder: The folder.
      backbone: The backbone that it was fitted with; not needed for pixel patches.
      params: Its parameters.
      **options: Of :class:`SubspaceAD`.

    Returns:
      The model, which scores as the saved one does, and can be updated.

    Raises:
      FileNotFoundError: The folder holds no such model.
      ValueError: A file is damaged, or the backbone is another one.
    """
    folder = pathlib.Path(folder).expanduser()
    for name in (ARRAYS, RECORD):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected {ARRAYS} and {RECORD}, found no {name}")
    try:
        record = json.loads((folder / RECORD).read_text())
        stored, _ = interop.read_header(folder / ARRAYS)
        moments = Moments(*(jnp.asarray(np.array(stored[name].read())) for name in Moments._fields))
        settings, described = SubspaceADSettings(**record["settings"]), record["backbone"]
        if backbone is None and described["kind"] == "PixelPatches":
            backbone = PixelPatches(**described["fields"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged, or of another version: {error!r}") from error
    if backbone is None:
        raise ValueError(f"backbone: {folder}: expected the one that was fitted with: {described}")
    if json.loads(json.dumps(_described(backbone))) != described:
        raise ValueError(f"backbone: {folder}: expected {described}, got {_described(backbone)}")
    return SubspaceAD(backbone, params, settings, **options).set_moments(moments)


def _described(backbone: Backbone) -> dict[str, Any]:
    return {"kind": type(backbone).__name__, "fields": dataclasses.asdict(backbone)}
