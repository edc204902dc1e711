"""The report of projected folders as text and as a picture."""

import os
import pathlib

from subspace_jax import train
from subspace_jax.interpret.safety_subspaces.folders import FolderReport, module_of

PICTURE = "energy.png"
_SHOWN = 8  # weights that are listed


def text_of(report: FolderReport) -> str:
    """The report for a terminal."""
    align = report.metrics[0].cos_task_align
    lines = [
        f"Cosine of the update and the reference update: {align:.4f}",
        "",
        "Share of the squared update in directions of the reference update, beside that of as many random directions",
        "  fraction  in the directions  expected of random  added by the method  cosine with what is added",
    ]
    for frac, metrics, random in zip(report.fracs, report.metrics, report.random, strict=True):
        inside = 1 - metrics.energy_kept if report.settings.method == "orth" else metrics.energy_kept
        cells = (f"{inside:17.4f}", f"{random:18.4f}", f"{metrics.energy_kept:19.4f}", f"{metrics.cos_task_proj:25.4f}")
        lines.append(f"  {frac:<8g}  {'  '.join(cells)}")
    at = report.fracs.index(shown_fraction(report))
    ranked = sorted(report.weights, key=lambda name: -_ratio(report, name, at))[:_SHOWN]
    size = max(map(len, ranked))
    lines += ["", f"Weights with the largest share over that of random directions, at fraction {report.fracs[at]:g}"]
    lines += [f"  {'weight':<{size}}   share  random  cosine  update / weight"]
    for name in ranked:
        found = report.weights[name]
        cells = f"{found.energies[at]:6.4f}  {found.random[at]:6.4f}  {found.cosine:6.3f}  {found.update_norm:.2e}"
        lines.append(f"  {name:<{size}}  {cells}")
    return "\n".join(lines)


def draw(report: FolderReport, folder: str | os.PathLike) -> pathlib.Path:
    """Writes the picture: shares over fractions, and over the layers at one of them.

    Args:
      report: The report.
      folder: Where ``energy.png`` is written.

    Returns:
      The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    orth = report.settings.method == "orth"
    inside = [1 - found.energy_kept if orth else found.energy_kept for found in report.metrics]
    names = {"top": "leading directions", "random": "directions of Gaussian values", "random_k": "drawn directions"}
    left.plot(report.fracs, inside, "-o", markersize=3, label=names[report.settings.basis])
    left.plot(report.fracs, report.random, "--", color="C7", label="expected of random directions")
    for i, frac in enumerate(report.written):
        left.axvline(frac, color="C3", linewidth=0.8, label=None if i else "models written")
    left.set(xlabel="fraction of the directions", ylabel="share of the squared update", xlim=(0, 1), ylim=(0, 1.02))
    left.legend(fontsize="small")
    at = report.fracs.index(shown_fraction(report))
    sums: dict[str, list[float]] = {}
    for name, found in report.weights.items():
        own = sums.setdefault(module_of(name), [0.0, 0.0, 0.0])
        for i, share in enumerate((1.0, found.energies[at], found.random[at])):
            own[i] += found.update_energy * share
    moved = {name: sums[name] for name in sorted(sums, key=_by_number) if sums[name][0]}
    for i, (style, label) in enumerate((("o", "in the directions"), ("_", "expected of random ones")), start=1):
        right.plot([own[i] / own[0] for own in moved.values()], style, label=label, color="C0" if i == 1 else "C7")
    few = max(1, len(moved) // 20)
    right.set_xticks(range(0, len(moved), few), list(moved)[::few], rotation=90, fontsize=7)
    right.set(ylabel="share of the squared update", ylim=(0, None), title=f"by layer, at fraction {report.fracs[at]:g}")
    right.legend(fontsize="small")
    file = pathlib.Path(folder) / PICTURE
    with train.replacing(file) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return file


def shown_fraction(report: FolderReport) -> float:
    """The fraction of tables by weight: the least at which a model is written, or a tenth."""
    return min(report.settings.fracs, default=0.1)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _ratio(report: FolderReport, name: str, at: int) -> float:
    found = report.weights[name]
    return found.energies[at] / found.random[at]
