"""What the command writes about the attention layers of a model: a table, JSON, and a picture."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from subspace_jax import train
from subspace_jax.interpret.attention_ssm.language_model import LayerMeasure

RECORD, PICTURE = "operators.json", "operators.png"
_HEAD = ("layer", "rank", "effective", "half error", "mean distance", "first token", "half-distance", "log slope")


def layers_table(layers: Sequence[LayerMeasure]) -> str:
    """Returns a table of the layers as text."""
    rows = [_HEAD]
    for i, own in enumerate(layers):
        ranks = (f"{own.rank}", f"{own.effective_rank:.2f}", f"{own.half_error:.3f}")
        distances = (f"{own.mean_distance:.1f}", f"{own.first_token:.3f}", f"{own.half_distance}")
        rows.append((f"{i}", *ranks, *distances, f"{own.log_slope:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def summary(layers: Sequence[LayerMeasure]) -> dict[str, float]:
    """Returns scalars over all layers: means, and the smallest rank over the number of heads."""
    heads = len(layers[0].singular_values)
    means = ("effective_rank", "half_error", "mean_distance", "first_token", "half_distance", "log_slope")
    found = {name: float(np.mean([getattr(own, name) for own in layers])) for name in means}
    return {"rank_over_heads": min(own.rank for own in layers) / heads, "heads": float(heads), **found}


def write_record(folder: str | os.PathLike, layers: Sequence[LayerMeasure], about: Mapping) -> pathlib.Path:
    """Writes all numbers of all layers as JSON, with entries that say what was measured."""
    rows = [
        {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in own._asdict().items()} for own in layers
    ]
    path = pathlib.Path(folder) / RECORD
    with train.replacing(path) as partial:
        partial.write_text(json.dumps({**about, "summary": summary(layers), "layers": rows}, indent=2) + "\n")
    return path


def draw(folder: str | os.PathLike, layers: Sequence[LayerMeasure]) -> pathlib.Path:
    """Draws ranks, spectra and gradients of all layers as a PNG."""
    from matplotlib.figure import Figure

    spectra = np.stack([own.singular_values for own in layers])
    profiles = np.stack([own.profile for own in layers])
    count, heads = spectra.shape
    figure = Figure(figsize=(12, 0.9 + max(3.0, 0.13 * count)), layout="constrained")
    ranks, spectrum, gradients = figure.subplots(1, 3)
    where = np.arange(count)
    ranks.barh(where, [own.rank for own in layers], color="C7", label="interaction rank")
    ranks.barh(where, [own.effective_rank for own in layers], height=0.5, color="C0", label="effective rank")
    ranks.axvline(heads, color="C3", linestyle=":", label="heads")
    ranks.set(xlabel="heads", ylabel="layer", title="How many heads a layer uses")
    ranks.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    ranks.set_ylim(count - 0.5, -0.5)
    tiny = np.finfo(np.float32).tiny
    shares = np.log10(np.maximum(spectra / np.maximum(spectra[:, :1], tiny), 1e-4))
    falls = np.log10(np.maximum(profiles / np.maximum(profiles.max(axis=1, keepdims=True), tiny), 1e-4))
    panels = (
        (spectrum, shares, 1, "singular value", "Singular values of the operators"),
        (gradients, falls, 0, "distance in tokens", "Gradient of the last output by distance"),
    )
    for axis, values, first, label, title in panels:
        extent = (first - 0.5, first + values.shape[1] - 0.5, count - 0.5, -0.5)
        image = axis.imshow(values, aspect="auto", vmin=-4, vmax=0, interpolation="nearest", extent=extent)
        axis.set(xlabel=label, ylabel="layer", title=title)
        figure.colorbar(image, ax=axis, label="log10, relative to the layer's largest")
    path = pathlib.Path(folder) / PICTURE
    with train.replacing(path) as partial:
        figure.savefig(partial, dpi=120)
    return path
