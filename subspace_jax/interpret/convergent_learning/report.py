"""The report of a comparison: a table for the terminal, heat maps over layers, a page, and all numbers as JSON."""

import base64
import html
import json
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from subspace_jax import train
from subspace_jax.interpret.convergent_learning.compare import Score
from subspace_jax.interpret.convergent_learning.layers import LayerComparison

HEAT_MAPS, TABLE, REPORT = "layers.png", "compare.json", "report.html"
_MEANING = {
    "linear_cka": "linear CKA",
    "debiased_cka": "linear CKA, debiased",
    "procrustes": "Procrustes similarity",
    "cca_mean": "mean canonical correlation",
    "cca_r2": "mean squared canonical correlation",
    "pwcca": "projection-weighted CCA",
    "svcca": "SVCCA, 99 % of the variance",
    "r2_x_from_y": "R² of A predicted linearly from B",
    "r2_y_from_x": "R² of B predicted linearly from A",
    "semi_match": "correlation with the best unit",
    "max_match": "correlation with the matched unit",
    "rbf_cka": "RBF CKA",
    "debiased_rbf_cka": "RBF CKA, debiased",
    "mutual_knn": "shared nearest neighbours",
    "cycle_knn": "neighbours that return",
    "lcs_knn": "common order of neighbours",
    "cknna": "kernel alignment of neighbours",
}
_HEAD = ("measure", "value", "shuffled", "calibrated", "p", "note")
_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } caption { text-align: left; font-weight: 600; padding: .3em 0; }
td, th { border-bottom: 1px solid #ccc; padding: .25em .8em .25em 0; text-align: left; } img { max-width: 100%; }"""


def score_rows(scores: dict[str, Score]) -> list[tuple[str, ...]]:
    """Rows of the table of one pair of layers: measure, value, mean of shuffles, calibrated value, p-value and note."""
    rows = []
    for name, s in scores.items():
        numbers = ("-" if math.isnan(v) else f"{v:.4f}" for v in (s.value, s.null_mean, s.calibrated, s.p_value))
        subset = f"of {s.null_examples} examples" if not s.note and s.examples == s.null_examples else s.note
        rows.append((_MEANING[name], *numbers, subset or f"shuffles of {s.null_examples} of {s.examples} examples"))
    return rows


def layer_rows(found: LayerComparison, measure: str) -> list[tuple[str, ...]]:
    """The layer of B that is most like each layer of A by a calibrated measure, and the next."""
    matrix, rows = found.matrix(measure), []
    for name, values in zip(found.rows, matrix, strict=True):
        if np.isnan(values).all():
            rows.append((name, "-", "-", "-"))
            continue
        best = int(np.nanargmax(values))
        p = found.scores[name, found.columns[best]][measure].p_value
        rows.append((name, found.columns[best], f"{values[best]:.4f}", f"{p:.4f}"))
    return rows


def table_text(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    lines = [tuple(head), *rows]
    lines = [(*line, *[""] * (max(map(len, lines)) - len(line))) for line in lines]
    sizes = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip() for line in lines]
    return "\n".join([caption, *(f"  {line}" for line in shown)])


def tables(found: LayerComparison) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Caption, head and rows of each table of a comparison."""
    if len(found.scores) == 1:
        ((pair, scores),) = found.scores.items()
        caption = f"{pair[0]} and {pair[1]}: 0 calibrated is independent, 1 is equal"
        return [(caption, _HEAD, score_rows(scores))]
    measures = next(iter(found.scores.values()))
    head = ("layer of A", "most like layer of B", "calibrated", "p")
    return [(f"{_MEANING[name]}, calibrated by shuffles", head, layer_rows(found, name)) for name in measures]


def write_heat_maps(found: LayerComparison, folder: str | os.PathLike) -> None:
    """Writes ``layers.png``: a heat map of calibrated values over the layers for each measure."""
    from matplotlib.figure import Figure

    measures = list(next(iter(found.scores.values())))
    columns = min(3, len(measures))
    lines = -(-len(measures) // columns)
    size = max(3.2, 0.28 * max(len(found.rows), len(found.columns)) + 1.6)
    figure = Figure(figsize=(1.1 * size * columns, 0.9 * size * lines), layout="constrained")
    for axis, name in zip(figure.subplots(lines, columns, squeeze=False).flat, measures, strict=False):
        values = found.matrix(name)
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower")
        axis.set_facecolor("0.9")
        axis.set(xlabel="layer of B", ylabel="layer of A")
        trivial = "\n(grey: trivial for so few examples)" if np.isnan(values).any() else ""
        axis.set_title(_MEANING[name] + trivial, fontsize=9)
        axis.set_xticks(range(len(found.columns)), found.columns, rotation=90 if len(found.columns) > 6 else 0)
        axis.set_yticks(range(len(found.rows)), found.rows)
        figure.colorbar(image, ax=axis, shrink=0.7)
    for axis in figure.axes[len(measures) : lines * columns]:
        axis.set_visible(False)
    with train.replacing(pathlib.Path(folder) / HEAT_MAPS) as partial:
        figure.savefig(partial, dpi=110)


def write_report(found: LayerComparison, folder: str | os.PathLike, settings: dict) -> None:
    """Writes ``compare.json`` and ``report.html``, with the heat maps in it where there are any.

    Args:
      found: The comparison.
      folder: The folder.
      settings: What the comparison was made with, for both.
    """
    folder = pathlib.Path(folder)
    pairs = [
        {"a": a, "b": b, "scores": {name: _without_nan(s) for name, s in scores.items()}}
        for (a, b), scores in found.scores.items()
    ]
    constant = [{"side": side, "layer": layer, "units": count} for (side, layer), count in found.constant.items()]
    with train.replacing(folder / TABLE) as partial:
        partial.write_text(
            json.dumps({"settings": settings, "constant_units": constant, "pairs": pairs}, indent=1) + "\n"
        )
    title = f"{settings['a']} and {settings['b']}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if (folder / HEAT_MAPS).is_file() and len(found.scores) > 1:
        picture = base64.b64encode((folder / HEAT_MAPS).read_bytes()).decode()
        parts.append(f'<img alt="heat maps over layers" src="data:image/png;base64,{picture}">')
    for caption, head, rows in tables(found):
        cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
        cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        parts.append(f"<table><caption>{html.escape(caption)}</caption>{''.join(cells)}</table>")
    parts += [f"<p>{html.escape(line)}</p>" for line in (*constant_lines(found), NOTE)]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    with train.replacing(folder / REPORT) as partial:
        partial.write_text(f"{page}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n", encoding="utf-8")


NOTE = (
    "Shuffled: the mean of the measure with the examples of B in random order, which have the same width, number and "
    "spectrum and nothing in common with A.  Calibrated: (value - shuffled) / (1 - shuffled).  p: the share of orders, "
    "the true one among them, that reach the value."
)


def constant_lines(found: LayerComparison) -> list[str]:
    """A line for each layer with constant units, whose correlations are 0."""
    names = {"x": "A", "y": "B"}
    return [
        f"{count} constant unit{'s' if count > 1 else ''} in layer {layer} of {names[side]}"
        for (side, layer), count in found.constant.items()
    ]


def _without_nan(score: Score) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in score._asdict().items()}
