"""Where the numbers of a run go: a JSONL file, TensorBoard, a progress bar, and curves as a picture."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm.auto import tqdm


class MetricsLog:
    """Writes rows of numbers to ``metrics.jsonl`` and to TensorBoard below ``tensorboard/``.

    On resume, rows after the step from which the run goes on are dropped, so that the file reads as if the run had
    never been interrupted.  Only the first process writes.

    Args:
      workdir: Folder of the run.
      start_step: Step from which the run goes on.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0):
        self.path = Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= start_step] if start_step else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.path)
        self._file = self.path.open("a", buffering=1)
        # TensorBoard drops what earlier files hold of the purge step and later ones.
        board = Path(workdir) / "tensorboard"
        # File names tell seconds only: the suffix keeps runs apart that were started in the same one.
        self._board = SummaryWriter(str(board), purge_step=start_step + 1, filename_suffix=f".{start_step}")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds a row: the numbers of one split at one step, ``null`` for what is not finite: JSON has no NaN."""
        if not self._writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._writes:
            self._file.close()
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, float | str | None]]:
    """Reads a ``metrics.jsonl``; a last line that a killed run left unfinished is passed over.

    Args:
      path: The file.

    Returns:
      The rows; none where there is no file.
    """
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def progress_bar(total: int, start: int, *, show: bool) -> tqdm:
    """A bar with steps, rate and time left; the loss goes into its postfix."""
    return tqdm(total=total, initial=start, disable=not show or jax.process_index() != 0, unit="step", miniters=1)


def plot_curves(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """Draws the curves of one or more runs over the steps, a panel for each metric.

    Args:
      runs: Label to ``metrics.jsonl``.
      output: The PNG to write.
    """
    from matplotlib.figure import Figure

    rows = {label: read_metrics(path) for label, path in runs.items()}
    panels = sorted(
        {(row["split"], name) for run in rows.values() for row in run for name in row.keys() - {"step", "split"}}
    )
    if not panels:
        return
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (split, name) in zip(axes, panels, strict=False):
        for label, run in rows.items():
            points = [row for row in run if row["split"] == split and name in row]
            values = [math.nan if row[name] is None else row[name] for row in points]
            axis.plot([row["step"] for row in points], values, label=label)
        axis.set(title=f"{split} {name}", xlabel="step")
        axis.grid(alpha=0.3)
        if len(rows) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(output, dpi=120)
