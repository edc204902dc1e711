"""The report of merged folders: its numbers, as JSON, as text and as a picture."""

import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from subspace_jax import train
from subspace_jax.merge.subspace_fusion.settings import MergeSettings

PICTURE = "merge.png"


class TensorReport(NamedTuple):
    """A merged tensor.

    Attributes:
      shape: Its shape.
      base_norm: Norm of the base.
      products: Inner products of the task vectors, ``[T, T]``.
      conflicts: Share of the entries in which two task vectors have opposite signs.
    """

    shape: tuple[int, ...]
    base_norm: float
    products: np.ndarray
    conflicts: float


class MergeReport(NamedTuple):
    """What was merged.

    Attributes:
      settings: The settings.
      models: The folders of the models.
      tensors: Report of each tensor by name; none without a base.
      thresholds: Of TIES, one for each model.
      folder: The folder that was written.
    """

    settings: MergeSettings
    models: tuple[str, ...]
    tensors: dict[str, TensorReport]
    thresholds: tuple[float, ...]
    folder: pathlib.Path

    def products(self) -> np.ndarray:
        """Inner products of the task vectors over all tensors, ``[T, T]``."""
        return sum((found.products for found in self.tensors.values()), np.zeros((len(self.models),) * 2))

    def conflicts(self) -> float:
        """Share of all entries in which two task vectors have opposite signs."""
        sizes = [math.prod(found.shape) for found in self.tensors.values()]
        return float(np.average([found.conflicts for found in self.tensors.values()], weights=sizes)) if sizes else 0.0


def as_json(report: MergeReport) -> dict[str, Any]:
    """The report as plain numbers."""
    found = {
        **report.settings._asdict(),
        "models": list(report.models),
        "thresholds": list(report.thresholds),
        "conflicts": report.conflicts(),
        "cosines": cosines(report.products()).tolist() if report.tensors else [],
    }
    tensors = {
        name: {
            "shape": list(one.shape),
            "base_norm": one.base_norm,
            "task_vector_norms": np.sqrt(np.diagonal(one.products)).tolist(),
            "cosines": cosines(one.products).tolist(),
            "conflicts": one.conflicts,
        }
        for name, one in report.tensors.items()
    }
    return found | {"tensors": tensors}


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines from inner products ``[T, T]``; 0 where a vector is."""
    norms = np.sqrt(np.diagonal(products))
    scale = np.outer(norms, norms)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)


def text_of(report: MergeReport) -> str:
    """The report for a terminal."""
    settings, names = report.settings, _names(report)
    lines = [f"Merged {len(names)} models by {settings.rule}"]
    if report.thresholds:
        lines.append(f"Thresholds of magnitude: {', '.join(f'{low:.3g}' for low in report.thresholds)}")
    if not report.tensors:
        return "\n".join(lines)
    products = report.products()
    base = sum(found.base_norm**2 for found in report.tensors.values()) ** 0.5
    lines += [f"Share of the entries in which two models moved in opposite directions: {report.conflicts():.4f}", ""]
    size = max(map(len, names))
    header = "  ".join(f"{i:>6}" for i in range(1, len(names) + 1))
    lines.append(f"  {'model':<{size + 4}}  moved by / base  cosines with {header}")
    for i, (name, row) in enumerate(zip(names, cosines(products), strict=True)):
        share = products[i, i] ** 0.5 / base if base else 0.0
        values = "  ".join(f"{value:6.3f}" for value in row)
        lines.append(f"  {i + 1:>2}  {name:<{size}}  {share:15.2e}  {'':13}{values}")
    return "\n".join(lines)


def draw(report: MergeReport, folder: str | os.PathLike) -> pathlib.Path:
    """Writes the picture: cosines of the task vectors, and their norms over that of the base by layer.

    Args:
      report: The report, of folders with a base.
      folder: Where ``merge.png`` is written.

    Returns:
      The file.
    """
    from matplotlib.figure import Figure

    names, products = _names(report), report.products()
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(cosines(products), vmin=-1, vmax=1, cmap="RdBu")
    for (i, j), value in np.ndenumerate(cosines(products)):
        left.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
    left.set(title="cosines of the task vectors")
    left.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=left, shrink=0.8)
    layers: dict[str, np.ndarray] = {}
    for name, found in report.tensors.items():
        own = np.append(np.diagonal(found.products), found.base_norm**2)
        layers[_layer(name)] = layers.get(_layer(name), 0) + own
    rows = np.array(list(layers.values()))
    shares = np.sqrt(rows[:, :-1] / np.maximum(rows[:, -1:], np.finfo(float).tiny))
    for i, name in enumerate(names):
        right.plot(shares[:, i], "o-", markersize=3, label=name)
    few = max(1, len(layers) // 20)
    right.set_xticks(range(0, len(layers), few), list(layers)[::few], rotation=90, fontsize=7)
    right.set(ylabel="norm of the task vector / norm of the base", ylim=(0, None), title="by layer")
    right.legend(fontsize="small")
    file = pathlib.Path(folder) / PICTURE
    with train.replacing(file) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return file


def _names(report: MergeReport) -> list[str]:
    """The last parts of the folders, or as many as tell them apart."""
    parts = [pathlib.Path(model).expanduser().absolute().parts for model in report.models]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _layer(name: str) -> str:
    """The layer of a tensor, as in "layers.3"; of others the name without its last part."""
    parts = name.split(".")
    numbers = [i for i, text in enumerate(parts) if text.isdigit()]
    return ".".join(parts[max(numbers[0] - 1, 0) : numbers[0] + 1] if numbers else parts[:-1] or parts)
