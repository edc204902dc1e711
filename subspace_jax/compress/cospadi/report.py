"""What a compression has done, as a table, a JSON file and a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax import train
from subspace_jax.compress.cospadi.folder import CompressReport


def summary_text(report: CompressReport) -> str:
    """Returns a line for each kind of kernel, and the bytes."""
    lines = ["kernel      mean error   worst layer"]
    for path, errors in report.errors.items():
        worst = int(np.argmax(errors))
        lines.append(f"{path:10}  {np.mean(errors):10.4f}   {max(errors):.4f} (layer {worst})")
    saved = 1 - report.kernel_bytes / report.dense_bytes
    lines.append(
        f"kernels: {report.kernel_bytes:,} bytes instead of {report.dense_bytes:,} in bfloat16 ({100 * saved:.1f} % "
        f"less); all weights: {report.total_bytes:,} bytes"
    )
    return "\n".join(lines)


def write_report(out: Path, report: CompressReport, settings: Mapping[str, Any]) -> None:
    """Writes ``result.json`` and ``errors.png``: the relative output error of every kernel."""
    mean = float(np.mean([error for errors in report.errors.values() for error in errors]))
    with train.replacing(out / "result.json") as partial:
        told = {"mean_error": mean, **report._asdict(), "settings": dict(settings)}
        partial.write_text(json.dumps(told, indent=2) + "\n")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for path, errors in report.errors.items():
        axes.plot(errors, marker=".", label=path)
    axes.set(xlabel="layer", ylabel="relative output error", ylim=(0, None))
    axes.set_title(f"{settings['method']}, {100 * settings['ratio']:g} % of the storage removed")
    axes.legend(fontsize="small")
    with train.replacing(out / "errors.png") as partial:
        figure.savefig(partial, dpi=150)
