"""Curves of a run as a PNG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_jax.train.metrics_log import read_metrics
from subspace_jax.train.workdir import replacing

_FEW = 40  # points of a line that are drawn as such
_MOST = 60  # panels

Points = tuple[Sequence[int], Sequence[float]]
Panels = dict[tuple[str, str], dict[tuple[str, str], Points]]


def plot_curves(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """Plots the metrics of one or more runs over the steps: a panel for each metric, training and evaluation in one.

    A metric that never changes has no panel.  Of more than 60 panels those with one point are left out, and then the
    last ones.

    Args:
      runs: Label to ``metrics.jsonl``.
      output: The PNG to write; not written where there are no rows.
    """
    from matplotlib.figure import Figure

    panels = _panels({label: read_metrics(path) for label, path in runs.items()})
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    labels = list(runs)
    for axis, ((phase, name), series) in zip(axes, panels.items(), strict=False):
        _draw(axis, series, labels)
        axis.set(title=phase, xlabel="step", ylabel=name.replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with replacing(output) as partial:
        figure.savefig(partial, dpi=120)


def _panels(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Panels:
    """Returns (phase, metric) to (label, split) to points; the loss comes first, metrics of the step alone last."""
    found: dict = {}
    for label, run in rows.items():
        for row in run:
            phase, _, split = row["split"].rpartition("/")
            for name in row.keys() - {"step", "split"}:
                value = math.nan if row[name] is None else row[name]
                series = found.setdefault((phase, name), {}).setdefault((label, split), ([], []))
                series[0].append(row["step"])
                series[1].append(value)

    def order(panel):
        evaluated = any(split != "train" for _, split in found[panel])
        return panel[0], panel[1] != "loss", not evaluated, panel[1]

    shown = {
        panel: dict(sorted(found[panel].items(), key=lambda item: item[0][1] != "train"))
        for panel in sorted(found, key=order)
    }
    moving = {panel: series for panel, series in shown.items() if not _is_flat(series)}
    return _some(moving or shown)


def _some(panels: Panels) -> Panels:
    if len(panels) <= _MOST:
        return panels
    lines = {panel: s for panel, s in panels.items() if any(len(steps) > 1 for steps, _ in s.values())}
    return dict(list((lines or panels).items())[:_MOST])


def _is_flat(series: Mapping[Any, Points]) -> bool:
    values = [value for _, values in series.values() for value in values]
    finite = {value for value in values if math.isfinite(value)}
    return not finite or (len(values) > 1 and len(finite) == 1)


def _draw(axis: Any, series: Mapping[tuple[str, str], Points], labels: Sequence[str]) -> None:
    """Draws training as thin lines and evaluation as points; a colour is a run, or, where there is one, a split."""
    splits = sorted({split for _, split in series}, key=lambda split: (split != "train", split))
    for (label, split), (steps, values) in series.items():
        one = len(labels) == 1
        colour = f"C{splits.index(split) if one else labels.index(label)}"
        text = split if one else f"{label}, {split}" if len(splits) > 1 else label
        marker = "." if split == "train" else "o"
        marker = marker if split != "train" or len(steps) <= _FEW else ""
        style = {"linewidth": 1.0, "alpha": 0.6} if split == "train" and len(splits) > 1 else {"linewidth": 1.5}
        axis.plot(steps, values, color=colour, marker=marker, markersize=4, label=text, **style)
