"""Heat maps and curves as inline SVG."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

_LIGHT, _DARK = (244, 246, 252), (30, 50, 140)
_COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#17becf",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
)
_CELL, _LINE = 54, 17  # width and height of a cell
_CHARACTER = 6.2  # width of a character


def shown(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    if not 0.001 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, *, log: bool = False) -> str:
    """Draws a matrix as coloured cells with their numbers.

    Args:
      values: ``[rows, columns]``; NaN for an empty cell.
      rows: Names of the rows.
      columns: Names of the columns, written upwards.
      title: What it shows.
      log: Whether colours follow the logarithm.
    """
    scaled = np.log10(np.where(values > 0, values, np.nan)) if log else np.asarray(values, float)
    there = scaled[np.isfinite(scaled)]
    low, high = (there.min(), there.max()) if there.size else (0.0, 1.0)
    low = min(low, 0.0) if not log else low
    left = 12 + _CHARACTER * max(map(len, rows), default=0)
    top = 26 + _CHARACTER * max(map(len, columns), default=0)
    width, height = left + _CELL * len(columns) + 8, top + _LINE * len(rows) + 6
    parts = [f'<text x="2" y="14" class="title">{html.escape(title)}</text>']
    for j, name in enumerate(columns):
        x = left + _CELL * (j + 0.5) + 4
        parts.append(f'<text transform="translate({x:.0f} {top - 5:.0f}) rotate(-90)">{html.escape(name)}</text>')
    for i, row in enumerate(rows):
        y = top + _LINE * i
        parts.append(f'<text x="{left - 5:.0f}" y="{y + 12.5:.1f}" text-anchor="end">{html.escape(row)}</text>')
        for j, column in enumerate(columns):
            if not np.isfinite(values[i, j]):
                continue
            share = (scaled[i, j] - low) / (high - low) if np.isfinite(scaled[i, j]) and high > low else 0.0
            fill = "#{:02x}{:02x}{:02x}".format(
                *(round(a + (b - a) * share) for a, b in zip(_LIGHT, _DARK, strict=True))
            )
            x, ink = left + _CELL * j, "#fff" if share > 0.55 else "#222"
            number = shown(values[i, j])
            parts.append(
                f"<g><title>{html.escape(f'{row} {column}: {values[i, j]:.5g}')}</title>"
                f'<rect x="{x:.0f}" y="{y:.0f}" width="{_CELL - 1}" height="{_LINE - 1}" fill="{fill}"/>'
                f'<text x="{x + _CELL / 2:.0f}" y="{y + 12.5:.1f}" fill="{ink}" text-anchor="middle">{number}</text>'
                "</g>"
            )
    return _figure(width, height, title, parts)


def rank_curves(curves: Mapping[str, Mapping[int, float]], title: str) -> str:
    """Draws shares over ranks, which double from point to point.

    Args:
      curves: Name to rank to share.
      title: What it shows.
    """
    ranks = sorted({rank for curve in curves.values() for rank in curve})
    left, top, step, tall = 44.0, 30.0, 46.0, 190.0
    right = left + step * max(len(ranks) - 1, 1)
    parts = [f'<text x="2" y="14" class="title">{html.escape(title)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + tall * (1 - share)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{share:g}</text>')
    for i, rank in enumerate(ranks):
        parts.append(f'<text x="{left + step * i}" y="{top + tall + 16}" text-anchor="middle">{rank}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [(left + step * ranks.index(r), top + tall * (1 - share)) for r, share in sorted(curve.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 3"' if number >= len(_COLOURS) else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        y = top + 6 + 15 * number
        parts.append(f'<rect x="{right + 14}" y="{y - 8}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 32}" y="{y - 2}">{html.escape(name)}</text>')
    width = right + 40 + _CHARACTER * max(map(len, curves), default=0)
    return _figure(width, top + max(tall + 26, 15.0 * len(curves)), title, parts)


def _figure(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    width = max(width, 12 + 7.8 * len(title))
    return (
        f'<svg role="img" aria-label="{html.escape(title)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
