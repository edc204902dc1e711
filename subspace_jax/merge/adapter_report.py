"""The report of a merge of adapters: as text, as JSON and as a picture."""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from subspace_jax import train
from subspace_jax.merge.adapters import AdapterMerge, Loss, MergedAdapter

REPORT, PICTURE = "merge_report.json", "merge_report.png"


class AdapterReport(NamedTuple):
    """What was merged.

    Attributes:
      adapters: The folders.
      weights: The weight of each.
      how: Method, rank and kind.
      base: Folder of the model.
      merged: The result.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    how: AdapterMerge
    base: str
    merged: MergedAdapter

    @property
    def method(self) -> str:
        """Name of the kind of the result: LoRA or DoRA."""
        return next(iter(self.merged.settings.values())).method

    @property
    def ranks(self) -> dict[str, np.ndarray]:
        """The rank of each stacked weight, by path."""
        configs = zip(self.merged.losses.items(), self.merged.settings.values(), strict=True)
        return {path: np.broadcast_to(config.rank, loss.size.shape) for (path, loss), config in configs}

    def error(self, rank: int | None = None) -> float:
        """The relative error of the update of all weights together, at the ranks of the result or at a lower one."""
        ranks, losses = self.ranks, self.merged.losses
        lost = sum(float(np.sum(_lost(loss, ranks[path], rank))) for path, loss in losses.items())
        size = sum(float(np.sum(np.square(loss.size, dtype=float))) for loss in losses.values())
        return (lost / size) ** 0.5 if size else 0.0

    def curve(self) -> dict[int, float]:
        """The relative error at powers of two below the largest rank, and at that rank."""
        largest = max(int(np.max(rank)) for rank in self.ranks.values())
        ranks = [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest]
        return {rank: self.error(rank) for rank in ranks}


def _lost(loss: Loss, ranks: np.ndarray, rank: int | None) -> np.ndarray:
    """Squared norm of what each weight lacks: what it lacks now, and the singular values between both ranks."""
    squares = np.square(loss.spectrum, dtype=float)
    number = np.arange(squares.shape[-1])
    dropped = (number < ranks[..., None]) & (number >= (np.inf if rank is None else rank))
    return np.square(loss.lost, dtype=float) + np.where(dropped, squares, 0).sum(axis=-1)


def text_of(report: AdapterReport) -> str:
    """The report for a terminal."""
    losses, ranks = report.merged.losses, report.ranks
    width = max(map(len, losses))
    lines = [f"  {'weight':<{width}}   rank       norm  mean error  max error"]
    for path, loss in losses.items():
        low, high = int(np.min(ranks[path])), int(np.max(ranks[path]))
        rank = str(high) if low == high else f"{low}-{high}"
        size = float(np.sqrt(np.sum(np.square(loss.size, dtype=float))))
        lines.append(
            f"  {path:<{width}} {rank:>6} {size:10.4g}  {np.mean(loss.error):10.2e}  {np.max(loss.error):9.2e}"
        )
    lines += ["", f"Relative error of the update of all weights: {report.error():.2e}"]
    lower = [f"{error:.3f} at rank {rank}" for rank, error in report.curve().items()]
    lines += [f"At other ranks: {', '.join(lower[:-1])}"] if len(lower) > 1 else []
    return "\n".join(lines)


def as_json(report: AdapterReport) -> dict[str, Any]:
    """The report as JSON: what was merged, and norm, rank and relative error of every matrix."""
    how, ranks = report.how, report.ranks
    matrices = [
        {
            "weight": path,
            "layer": int(index[0]) if index else None,
            "rank": int(ranks[path][index]),
            "norm": float(loss.size[index]),
            "error": float(loss.error[index]),
        }
        for path, loss in report.merged.losses.items()
        for index in np.ndindex(loss.size.shape)
    ]
    return {
        "adapters": [{"folder": f, "weight": w} for f, w in zip(report.adapters, report.weights, strict=True)],
        "base": report.base,
        "method": how.method,
        **({"keep": how.keep} if how.method == "ties" else {}),
        "kind": report.method,
        "rank": int(max(np.max(rank) for rank in ranks.values())),
        "error": report.error(),
        "error_at_rank": {str(rank): error for rank, error in report.curve().items()},
        "matrices": matrices,
    }


def draw(report: AdapterReport, folder: str | os.PathLike) -> pathlib.Path:
    """Writes the picture: the error over the rank, and the norm of the update of each layer.

    Args:
      report: The report.
      folder: Where ``merge_report.png`` is written.

    Returns:
      The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    errors = report.curve()
    left.plot(list(errors), list(errors.values()), "-o", markersize=3)
    left.set(xlabel="rank", ylabel="relative error of the merged update", ylim=(0, None))
    left.set_xscale("log", base=2)
    for path, loss in report.merged.losses.items():
        name = path.removeprefix("layers/").removesuffix("/kernel")
        right.plot(np.atleast_1d(loss.size), "-o", markersize=3, label=name)
    right.set(xlabel="layer", ylabel="norm of the merged update", ylim=(0, None))
    right.legend(fontsize="small", ncols=2)
    file = pathlib.Path(folder) / PICTURE
    with train.replacing(file) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return file
