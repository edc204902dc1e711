"""The report of an alignment: a table for the terminal, and the curve over the number of directions."""

import os
import pathlib

import numpy as np

from subspace_jax import train
from subspace_jax.interpret.platos_cave_3d.evaluate import RETRIEVAL_KS
from subspace_jax.interpret.platos_cave_3d.fit import Found

CURVE = "curve.png"
# Correlations of anchors that are higher by so much are not to be relied on.
_GAP = 0.1


def table(found: Found) -> str:
    """Returns the table of matching and retrieval, and what is to be known of the correlations."""
    head = ("", "matching", *(f"top-{k}" for k in RETRIEVAL_KS))
    rows = [(f"{name}, {found.k} directions", *_shown(values)) for name, values in found.subspace.items()]
    rows += [(f"{name}, all features", *_shown(values)) for name, values in found.full.items()]
    rows.append(("chance", *_shown(found.chance)))
    sizes = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in (head, *rows)
    ]
    caption = f"{found.queries} held-out pairs, y finds x; {found.anchors} anchors, widths {found.widths[0]} and "
    return "\n".join([f"{caption}{found.widths[1]}", *(f"  {line}" for line in lines), "", *_correlations(found)])


def _shown(values):
    return (f"{x:.3f}" for x in values)


def _correlations(found: Found) -> list[str]:
    rho, held = np.nanmean(found.rho), np.nanmean(found.held_out_rho)
    lines = [
        f"Mean correlation of directions {rho:.3f} on the anchors, {held:.3f} on held-out pairs; ridge {found.reg:g}."
    ]
    features = sum(found.widths)
    if rho > held + _GAP or found.anchors < 2 * features:
        why = f"{found.anchors} anchors for {features} features"
        lines.append(
            f"The correlations of the anchors are over-fitted ({why}): go by the held-out ones, or add anchors."
        )
    chance = found.chance[3]
    # Within two standard deviations of chance.
    if found.subspace[found.method][3] < chance + 2 * np.sqrt(chance * (1 - chance) / found.queries):
        lines.append("Held-out pairs are hardly found: are the rows of both files the same items?")
    best = max(found.curve, key=lambda k: found.curve[k][2])
    if found.curve[best][2] > found.curve[found.k][2] + 0.02:
        lines.append(f"Top-5 by {found.method} is highest, {found.curve[best][2]:.3f}, with --k {best}.")
    return lines


def write_curve(found: Found, folder: str | os.PathLike) -> None:
    """Writes ``curve.png``: matching and retrieval over the number of directions, beside all features and chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for i, name, color in ((0, "matching", "C0"), (2, "top-5 retrieval", "C1")):
        axis.plot(list(found.curve), [values[i] for values in found.curve.values()], "-o", color=color, label=name)
        axis.axhline(found.full[found.method][i], color=color, linestyle="--", label=f"{name}, all features")
        axis.axhline(found.chance[i], color=color, linestyle=":", linewidth=1)
    axis.axvline(found.k, color="0.7", linewidth=1, label=f"k = {found.k}, of the maps")
    axis.set(xscale="log", xlabel="directions k (dotted: chance)", ylabel=f"share of {found.queries} held-out pairs")
    axis.set(ylim=(0, 1.02), title=f"How often y finds its x, {found.method}, {found.anchors} anchors")
    axis.set_xticks(list(found.curve), [f"{k}" for k in found.curve])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    with train.replacing(pathlib.Path(folder) / CURVE) as partial:
        figure.savefig(partial, dpi=120)
