"""The report of an inspection: JSON, a page that needs nothing else, and tables for a terminal."""

import html
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from subspace_jax import train
from subspace_jax.interpret.inspector.core import LEADING, RANKS, SKETCHED
from subspace_jax.interpret.inspector.matrix import EXACT
from subspace_jax.interpret.inspector.study import Inspection, WeightChange
from subspace_jax.interpret.inspector.svg import heat_map, rank_curves, shown

_KEPT = 8  # rank whose share of energy tables and heat maps show
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: .6em 0 }
caption { text-align: left; font-weight: 600; padding: .3em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .15em .7em .15em 0; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { margin: 6px 14px 6px 0; vertical-align: top; max-width: 100% }
svg text { font: 11px system-ui, sans-serif }
svg .title { font-weight: 600; font-size: 13px }
dt { font-weight: 600 }
details { margin: .6em 0 }
"""


class _Metric(NamedTuple):
    name: str
    title: str
    value: Callable[[WeightChange], float]
    log: bool = False


def _spectral(read: Callable[[Any], float]) -> Callable[[WeightChange], float]:
    return lambda change: math.nan if change.spectrum is None else float(read(change.spectrum))


def _overlap(change: WeightChange) -> float:
    sides = [side for side in (change.left, change.right) if side is not None]
    return sum(side.overlap / side.random for side in sides) / len(sides) if sides else math.nan


METRICS = (
    _Metric("rel. norm", "Norm of the update over the base's", lambda change: change.relative_norm, True),
    _Metric("rank", "Rank above rounding", _spectral(lambda s: s.rank)),
    _Metric("eff. rank", "Effective rank", _spectral(lambda s: s.effective_rank)),
    _Metric(f"kept by {_KEPT}", f"Energy kept by rank {_KEPT}", _spectral(lambda s: _kept(s.kept, _KEPT))),
    _Metric("overlap", "Overlap with the base's leading directions, over random", _overlap),
    _Metric(
        "intruders", "Intruder dimensions", lambda c: math.nan if c.intruders is None else float(c.intruders.count)
    ),
)


def _kept(kept: dict[int, float], rank: int) -> float:
    return kept.get(rank, max(kept.values()))


def output_files(out: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the page and the JSON of ``--out``: a file ``NAME.html``, or a folder.

    Raises:
      ValueError: It is another kind of file.
      OSError: The folder can't be made or written.
    """
    path = pathlib.Path(out).expanduser()
    if path.suffix.lower() in (".html", ".htm"):
        if path.is_dir():
            raise ValueError(f"--out: expected a file or a folder, got {path}, a folder named like a file")
        return train.writable_folder(path.parent) / path.name, path.absolute().with_suffix(".json")
    if path.is_file():
        raise ValueError(f"--out: expected a folder or a file NAME.html, got the file {path}")
    folder = train.writable_folder(path)
    return folder / "report.html", folder / "report.json"


def write_report(inspection: Inspection, page: pathlib.Path, data: pathlib.Path) -> None:
    """Writes the page and the JSON."""
    with train.replacing(data) as partial:
        partial.write_text(json.dumps(to_json(inspection), allow_nan=False) + "\n")
    with train.replacing(page) as partial:
        partial.write_text(to_html(inspection), encoding="utf-8")


def to_json(inspection: Inspection) -> dict[str, Any]:
    """Returns all numbers, rounded to six digits; what is not finite is null."""
    overlaps = inspection.overlaps
    return _plain(
        {
            "base": inspection.base,
            "top": inspection.top,
            "threshold": inspection.threshold,
            "leading": LEADING,
            "exact_width": EXACT,
            "updates": [
                {"label": label, "source": source, "weights": [_as_dict(change) for change in changes]}
                for label, source, changes in zip(
                    inspection.labels, inspection.sources, inspection.changes, strict=True
                )
            ],
            "overlaps": None if overlaps is None else overlaps._asdict(),
        }
    )


def _as_dict(change: WeightChange) -> dict[str, Any]:
    parts = ("spectrum", "left", "right", "intruders")
    return change._asdict() | {name: None if (x := getattr(change, name)) is None else x._asdict() for name in parts}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(x) for x in value]
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def headline(changes: Sequence[WeightChange]) -> str:
    """Says in a sentence what an update changed."""
    changed = [change for change in changes if change.relative_norm > 0]
    if not changed:
        return f"Nothing changed: all {len(changes)} weights equal those of the base."
    # An adapter is compared where it has factors, and the base has more weights.
    count = f"{len(changed)} of {len(changes)}" if len(changed) < len(changes) else f"All {len(changes)} compared"
    text = f"{count} weights differ from the base"
    norms = math.hypot(*(c.relative_norm * c.base_norm for c in changed if math.isfinite(c.relative_norm)))
    base = math.hypot(*(c.base_norm for c in changes))
    matrices = [c for c in changed if c.spectrum is not None]
    if base:
        text += f"; the norm of all changes is {norms / base:.3g} of these weights'"
    if not matrices:
        return f"{text}."
    ranks = sorted(c.spectrum.rank for c in matrices)
    bound = "at least " if any(c.spectrum.rank_is_bound for c in matrices) else ""
    text += f". Matrices: median rank {bound}{ranks[len(ranks) // 2]}, from {ranks[0]} to {bound}{ranks[-1]}"
    if below := sum(rank == 0 for rank in ranks):
        text += f"; {below} changes are below what rounding makes"
    counted = [c.intruders for c in matrices if c.intruders is not None]
    text += f"; {sum(i.count for i in counted)} intruder dimensions"
    if undecided := sum(i.undecided for i in counted):
        text += f", {undecided} more undecided"
    return f"{text}."


def summary_table(changes: Sequence[WeightChange]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a row for each kind of matrix: medians over layers, and the sum of intruders."""
    kinds: dict[str, list[WeightChange]] = {}
    for change in changes:
        if change.spectrum is not None:
            kinds.setdefault(change.kind, []).append(change)
    rows = []
    for kind, own in kinds.items():
        cells = [kind, str(len(own))]
        for metric in METRICS:
            values = [v for c in own if not math.isnan(v := metric.value(c))]
            middle = sum(values) if metric.name == "intruders" else float(np.median(values)) if values else math.nan
            cells.append(shown(middle))
        rows.append(cells)
    return ["kind", "weights", *(metric.name for metric in METRICS)], rows


def to_text(inspection: Inspection) -> str:
    """Returns what a terminal shows."""
    parts = []
    for label, changes in zip(inspection.labels, inspection.changes, strict=True):
        head, rows = summary_table(changes)
        parts.append("\n".join([f"{label}: {headline(changes)}", *(_lines(head, rows) if rows else [])]))
    if inspection.overlaps is not None:
        head, rows = _overlap_table(inspection)
        parts.append("\n".join(["Overlap of leading directions (of random subspaces)", *_lines(head, rows)]))
    return "\n\n".join(parts)


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    sizes = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  " + "  ".join(c.rjust(n) if i else c.ljust(n) for i, (c, n) in enumerate(zip(row, sizes, strict=True)))
        for row in (head, *rows)
    ]


def _overlap_table(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    found = inspection.overlaps
    cells = [
        [f"{shown(a)} ({shown(b)})" for a, b in zip(overlap, random, strict=True)]
        for overlap, random in zip(found.overlap, found.random, strict=True)
    ]
    return ["", *inspection.labels], [[label, *row] for label, row in zip(inspection.labels, cells, strict=True)]


def to_html(inspection: Inspection) -> str:
    """Returns the page: one file without scripts, and without anything from elsewhere."""
    title = f"What changed in {pathlib.Path(inspection.base).name}"
    parts = [f"<h1>{html.escape(title)}</h1><p>Base: <code>{html.escape(inspection.base)}</code></p>"]
    for label, source, changes in zip(inspection.labels, inspection.sources, inspection.changes, strict=True):
        parts += [f"<h2>{html.escape(label)}</h2><p><code>{html.escape(source)}</code></p>"]
        parts += [f"<p>{html.escape(headline(changes))}</p>", *_pictures(changes)]
    if inspection.overlaps is not None:
        parts += ["<h2>Overlaps of the updates</h2>", *_overlap_pictures(inspection)]
    parts.append(_legend(inspection))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"


def _pictures(changes: Sequence[WeightChange]) -> list[str]:
    matrices = [change for change in changes if change.spectrum is not None]
    if not matrices:
        return []
    head, rows = summary_table(changes)
    parts = [_table(head, rows, "Medians over the layers; intruders are summed")]
    layered = [change for change in matrices if change.layer is not None] or matrices
    kinds = list(dict.fromkeys(change.kind for change in layered))
    groups = {change.group for change in layered}
    names = list(dict.fromkeys((change.group, change.layer) for change in layered))
    labels = ["" if layer is None else str(layer) if len(groups) == 1 else f"{group}.{layer}" for group, layer in names]
    for metric in METRICS:
        values = np.full((len(names), len(kinds)), math.nan)
        for change in layered:
            values[names.index((change.group, change.layer)), kinds.index(change.kind)] = metric.value(change)
        parts.append(heat_map(values, labels, kinds, metric.title, log=metric.log))
    curves = {}
    for kind in kinds:
        kept = [change.spectrum.kept for change in matrices if change.kind == kind]
        longest = [rank for rank in RANKS if any(rank in own for own in kept)]
        curves[kind] = {rank: float(np.mean([_kept(own, rank) for own in kept])) for rank in longest}
    parts.append(rank_curves(curves, "Share of the energy kept by the best update of a rank, mean over layers"))
    return [*parts, _all_weights(changes)]


def _all_weights(changes: Sequence[WeightChange]) -> str:
    changed = sorted((c for c in changes if c.relative_norm > 0), key=lambda c: -c.relative_norm)
    head = ["weight", "shape", *(metric.name for metric in METRICS), "smallest angle, rows", "columns"]
    rows = []
    for change in changed:
        angles = ["–" if side is None else f"{side.angles[0]:.1f}°" for side in (change.left, change.right)]
        values = [shown(metric.value(change)) for metric in METRICS]
        if change.spectrum is not None and change.spectrum.rank_is_bound:
            values[1] = f"≥ {values[1]}"
        rows.append([change.weight, " × ".join(map(str, change.shape)), *values, *angles])
    table = _table(head, rows, "")
    return (
        f"<details><summary>All {len(rows)} changed weights, those that changed most first</summary>{table}</details>"
    )


def _overlap_pictures(inspection: Inspection) -> list[str]:
    labels, found = inspection.labels, inspection.overlaps
    return [
        heat_map(found.overlap, labels, labels, "Overlap of leading directions"),
        heat_map(found.random, labels, labels, "The same of random subspaces"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"


def _legend(inspection: Inspection) -> str:
    terms = {
        "Norm of the update over the base's": "Frobenius norms; the colours are logarithmic.",
        "Rank above rounding": (
            "Singular values of the difference above what rounding of the stored weights, and of the computation, can "
            f"make. Of weights wider than {EXACT}, {SKETCHED} are computed, and a rank of so many is a lower bound."
        ),
        "Effective rank": "Exponential of the entropy of the singular values over their sum.",
        f"Energy kept by rank {_KEPT}": f"Share of the squared norm that the best approximation of rank {_KEPT} has.",
        "Overlap with the base's leading directions, over random": (
            f"Mean squared cosine of the principal angles between up to {LEADING} leading directions of the update and "
            "of the base, over its expectation for random subspaces; the mean of both sides. 1 is chance."
        ),
        "Intruder dimensions": (
            f"Among the {inspection.top} leading singular vectors of the tuned weight, those whose cosine with every "
            f"singular vector of the base is below {inspection.threshold:g} (arXiv 2410.21228)."
        ),
    }
    lines = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in terms.items())
    return f"<h2>What the numbers are</h2><dl>{lines}</dl>"
