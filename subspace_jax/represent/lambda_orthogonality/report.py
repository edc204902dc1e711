"""The report of an upgrade: tables for the terminal and for HTML, the curve as PNG and CSV."""

import base64
import html
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from subspace_jax import train
from subspace_jax.represent.lambda_orthogonality.maps import Chain, widths
from subspace_jax.represent.lambda_orthogonality.predict import Prediction

# The orders of re-embedding, in words.
_TITLES = {"worst": "worst first", "typical": "typical first", "random": "random order"}
# What is said of a sample in which the maps find nothing, of two files.
AT_CHANCE = (
    "the old vectors tell next to nothing about the new ones of the same items: recall is that of chance. Row i of %s "
    "and row i of %s have to be the same item; see whether one of them was sorted, shuffled or filtered"
)
CURVE, TABLE, REPORT = "curve.png", "curve.csv", "report.html"
_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } caption { text-align: left; font-weight: 600; padding: .3em 0; }
td, th { border-bottom: 1px solid #ccc; padding: .25em .8em .25em 0; text-align: left; }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; } img { max-width: 100%; }"""


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      caption: What it shows.
      head: Names of the columns.
      rows: Its rows.
      note: What is to be known beside it.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def text(self) -> str:
        """The table for a terminal."""
        lines = [self.head, *self.rows]
        sizes = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        shown = ["  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip() for line in lines]
        return "\n".join([self.caption, *(f"  {line}" for line in shown), *([f"  {self.note}"] if self.note else [])])

    def html(self) -> str:
        """The table for a page."""
        cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in self.head)}</tr>"]
        cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows]
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<table><caption>{html.escape(self.caption)}</caption>{''.join(cells)}</table>{note}"


def summary_table(found: Prediction, gallery: int | None = None) -> Table:
    """What queries find before, during and after the upgrade.

    Args:
      found: The prediction.
      gallery: Items of the store, for an extrapolation.
    """
    rows = [
        ("old queries, old vectors: before the upgrade", f"{found.old:.3f}"),
        ("new queries, old vectors, no map", f"{found.unmapped:.3f}"),
        ("new queries, old vectors mapped forward", f"{found.mapped:.3f}"),
        ("new queries mapped backward, old vectors", f"{found.backward:.3f}"),
        ("new queries and new vectors, both mapped backward", f"{found.kept:.3f}"),
        ("new queries, new vectors: all re-embedded", "1.000"),
    ]
    each = ", ".join(f"{r:.3f} of {size}" for size, r in zip(found.sizes, found.recalls, strict=True))
    note = f"Recall falls with the items among which is searched: mapped forward it is {each}."
    if gallery is not None and gallery > found.items:
        note += f" A line through these gives about {found.recall_among(gallery):.3f} of {gallery}: an extrapolation."
    if found.at_chance:
        note += f" Warning: {AT_CHANCE % ('--old', '--new')}."
    caption = f"Recall@{found.k} of the new model's own {found.k} nearest, predicted among {found.items} items"
    return Table(caption, ("", f"recall@{found.k}"), tuple(rows), note)


def curve_table(found: Prediction) -> Table:
    """Recall over the share of re-embedded items."""
    rows = ((f"{share:.0%}", *(f"{x:.3f}" for x in values)) for share, values in _points(found))
    areas = ", ".join(f"{found.areas[name]:.3f} {title}" for name, title in _TITLES.items())
    note = f"Area under the curve: {areas}.  order.npy has the {found.order} items first."
    return Table(f"Recall@{found.k} while the store is re-embedded", ("", *_TITLES.values()), tuple(rows), note)


def _points(found: Prediction) -> list[tuple[float, tuple[float, ...]]]:
    """Returns each share with the recall in each order of ``_TITLES``."""
    return list(zip(found.shares, zip(*(found.curves[name] for name in _TITLES), strict=True), strict=True))


def chain_table(rows: Sequence[dict[str, float]], names: Sequence[str], k: int) -> Table:
    """What each link of a chain costs, as :func:`check_chain` measured it."""
    cells = tuple(
        (name, f"{row['alone']:.3f}", f"{row['from_here']:.3f}", f"{row['cost']:.3f}")
        for name, row in zip(names, rows, strict=True)
    )
    return Table(
        f"Recall@{k} of the new model's own {k} nearest, measured link by link",
        ("link", "alone, in its own target space", "with all later links, in the newest space", "cost there"),
        cells,
        "Measured on the vectors given by --check; items that a link was fitted to make it look better.",
    )


def links_table(records: Sequence[dict], names: Sequence[str]) -> Table:
    """What each link promised when it was fitted, and what that makes of the chain."""
    recalls = [record["prediction"]["curves"]["random"][0] for record in records]
    product = 1.0
    for recall in recalls:
        product *= recall
    return Table(
        "Recall of each link, predicted when it was fitted",
        ("link", "recall mapped forward"),
        tuple((name, f"{recall:.3f}") for name, recall in zip(names, recalls, strict=True)),
        f"If the losses are independent, the chain keeps about {product:.3f}; --check measures it.",
    )


def write_curve(found: Prediction, folder: str | os.PathLike) -> None:
    """Writes the curve as ``curve.png`` and ``curve.csv``."""
    from matplotlib.figure import Figure

    folder = pathlib.Path(folder)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    percent = [100 * share for share in found.shares]
    for (name, title), style in zip(_TITLES.items(), ("-o", "-s", "--"), strict=True):
        axis.plot(percent, found.curves[name], style, markersize=4, label=title)
    axis.axhline(found.old, color="C3", linestyle=":", label="old model, before the upgrade")
    axis.axhline(found.unmapped, color="C7", linestyle=":", label="new queries, no map")
    axis.set(xlabel="items re-embedded, %", ylabel=f"recall@{found.k}", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    with train.replacing(folder / CURVE) as partial:
        figure.savefig(partial, dpi=120)
    lines = [f"share,{','.join(_TITLES)}"]
    lines += [",".join(f"{x:.6f}" for x in (share, *values)) for share, values in _points(found)]
    with train.replacing(folder / TABLE) as partial:
        partial.write_text("\n".join(lines) + "\n")


def write_report(folder: str | os.PathLike, chain: Chain, tables: Sequence[Table], files: Sequence[str]) -> None:
    """Writes ``report.html``, with the curve in it where there is one.

    Args:
      folder: The folder of the upgrade.
      chain: The maps.
      tables: What was found.
      files: What else the folder holds, and what for.
    """
    folder = pathlib.Path(folder)
    spaces = " → ".join(map(str, widths(chain)))
    parts = [f"<h1>Upgrade of vectors of width {spaces}</h1>", *(table.html() for table in tables)]
    if (folder / CURVE).is_file():
        picture = base64.b64encode((folder / CURVE).read_bytes()).decode()
        parts.append(f'<img alt="recall over the share of re-embedded items" src="data:image/png;base64,{picture}">')
    parts += ["<h2>Files</h2><ul>", *(f"<li>{html.escape(file)}</li>" for file in files), "</ul>"]
    parts += ["<h2>Use of the maps</h2>", f"<pre>{html.escape(usage(chain))}</pre>"]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Upgrade {spaces}</title>'
    with train.replacing(folder / REPORT) as partial:
        partial.write_text(f"{page}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n", encoding="utf-8")


def usage(chain: Chain) -> str:
    """Returns Python code that applies the maps without this library."""
    unit = "x / np.linalg.norm(x, axis=-1, keepdims=True)" if chain.metric == "cosine" else "x"
    order = ", ".join(map(str, range(len(chain.links))))
    reverse = ", ".join(map(str, reversed(range(len(chain.links)))))
    return f"""import numpy as np
from safetensors.numpy import load_file

maps = load_file("maps.safetensors")

def prepared(x):
    return {unit}

def mapped(x, direction):  # "forward": old vectors to the new space; "backward": new vectors to the old one
    x = prepared(x)
    for i in ({order},) if direction == "forward" else ({reverse},):
        x = prepared(x @ maps[f"{{i}}.{{direction}}.kernel"] + maps[f"{{i}}.{{direction}}.bias"])
    return x
"""
