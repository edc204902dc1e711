"""The fields of configs, and what they stand for."""

import os
from typing import Any

import ml_collections

from subspace_jax import interop
from subspace_jax.anomaly.subspacead.model import Backbone, SubspaceADSettings
from subspace_jax.anomaly.subspacead.patches import PixelPatches
from subspace_jax.anomaly.subspacead.vision import open_vision

PIXELS = "pixels"
_SIDES = {True: 256, False: 448}
# Up to so many normal images are rotated by default.
_FEW, _ROTATIONS = 8, 30


def default_config() -> ml_collections.ConfigDict:
    """Returns the fields of a detection.

    ``backbone`` is "pixels", the name of a model that `subspace-jax fetch` writes, or a folder.  ``side`` is 0 for 256
    pixels with pixel patches and 448 with a model.  ``layers`` is empty for the middle blocks.  ``shots`` normal images
    are drawn by ``seed``; 0 takes all.  ``rotations`` is -1 for 30 copies of each of up to 8 normal images and none of
    more; categories in ``unrotated`` are never rotated.  ``rank`` is -1 for the explained variance.  ``close`` and
    ``canvas`` are 0 for none, ``kernel_size`` 0 for the full width.  ``published`` holds figures to show beside those
    that are measured.  See :class:`SubspaceADSettings` for the others.
    """
    return ml_collections.ConfigDict(
        {
            "task": "subspace_jax.anomaly.subspacead",
            "seed": 0,
            "backbone": PIXELS,
            "side": 0,
            "layers": (),
            "combine": "mean",
            "dtype": "float32",
            "batch_size": 8,
            "shots": 0,
            "rotations": -1,
            "unrotated": ("transistor",),
            "explained_variance": 0.99,
            "rank": -1,
            "method": "reconstruction",
            "drop_leading": 0,
            "aggregate": "mtop1p",
            "sigma": 4.0,
            "kernel_size": 3,
            "close": 0,
            "background": "",
            "center_crop": False,
            "canvas": 0,
            "overlap": 0.0,
            "published": {"image_auroc": 0.0, "pixel_auroc": 0.0, "aupro": 0.0},
        }
    )


def open_backbone(config: ml_collections.ConfigDict) -> tuple[Backbone, Any]:
    """Opens the backbone of a config; returns it and its parameters.

    Raises:
      FileNotFoundError: There is no such folder; the message has the command that writes a known one.
      ValueError: The folder holds no vision transformer, or the side does not fit it.
    """
    name = config.backbone
    side = config.side or _SIDES[name == PIXELS]
    if name == PIXELS:
        return PixelPatches(side=side), ()
    package = interop.PACKAGES.get(name)
    folder = os.path.expanduser(package.folder if package and not os.path.isdir(name) else name)
    if not os.path.isdir(folder):
        hint = f"; `subspace-jax fetch {name}` writes it" if package else f"; or {PIXELS!r}, or dinov2-small"
        raise FileNotFoundError(f"backbone: there is no folder {folder}{hint}")
    depth_of_saliency = 6 if config.background else None
    return open_vision(
        folder,
        side,
        layers=tuple(config.layers) or None,
        combine=config.combine,
        dtype=config.dtype,
        saliency=depth_of_saliency,
    )


def settings_of(config: ml_collections.ConfigDict, category: str, num_normal: int) -> SubspaceADSettings:
    """Returns the settings for a category with so many normal images."""
    rotations = config.rotations
    if rotations < 0:
        rotations = _ROTATIONS if num_normal <= _FEW else 0
    return SubspaceADSettings(
        explained_variance=config.explained_variance,
        rank=None if config.rank < 0 else config.rank,
        method=config.method,
        drop_leading=config.drop_leading,
        rotations=0 if category in config.unrotated else rotations,
        aggregate=config.aggregate,
        sigma=config.sigma,
        kernel_size=config.kernel_size or None,
        close=config.close or None,
        background=config.background,
        center_crop=config.center_crop,
        canvas=config.canvas,
        overlap=config.overlap,
    )
