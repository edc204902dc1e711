"""SubspaceAD on VisA with the settings of the paper (arXiv 2602.23013).

    subspace-jax detect --data visa --config anomaly/visa:shots4 --out work/visa4

Variants: ``shots1``, ``shots2``, ``shots4`` and ``full``, the normal images that are fitted to.

DINOv2 with registers, giant, from a folder ``work/models/dinov2-giant``, at 672 pixels in bfloat16: for an accelerator;
``--backbone dinov2-small --config.side=448`` takes about a second an image on two cores.  Neither data nor model come
with this library.  Published means over the 12 categories (image AUROC / pixel AUROC / AU-PRO), not rerun here: 93.2 /
98.2 / 95.5 with one shot, 93.8 / 98.3 / 95.7 with two, 94.7 / 98.4 / 96.0 with four, 98.2 / 99.1 / 96.9 with all.
"""

from subspace_jax.anomaly.subspacead import config as subspacead

PUBLISHED = {
    "shots1": (0.932, 0.982, 0.955),
    "shots2": (0.938, 0.983, 0.957),
    "shots4": (0.947, 0.984, 0.960),
    "full": (0.982, 0.991, 0.969),
}


def get_config(variant="shots4"):
    if variant not in PUBLISHED:
        raise ValueError(f"variant: expected one of {tuple(PUBLISHED)}, got {variant!r}")
    config = subspacead.default_config()
    config.backbone = "work/models/dinov2-giant"
    config.side = 672
    config.dtype = "bfloat16"
    config.shots = 0 if variant == "full" else int(variant.removeprefix("shots"))
    config.rotations = 30
    names = ("image_auroc", "pixel_auroc", "aupro")
    config.published = dict(zip(names, PUBLISHED[variant], strict=True))
    return config
