"""What is shown of runs over streams: tables, a heat map of accuracies, and a comparison of methods over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subspace_jax import train
from subspace_jax.continual.stream import accuracy_matrix

SCORES = ("final_accuracy", "average_accuracy", "forgetting", "backward_transfer")


class Compared(NamedTuple):
    """The scores of a method over its seeds.

    Attributes:
      method: Its name.
      seeds: Seeds of its runs.
      mean: Score to mean, for the scores that all of its runs have.
      deviation: Score to standard deviation over the runs; 0 for one run.
    """

    method: str
    seeds: tuple[int, ...]
    mean: dict[str, float]
    deviation: dict[str, float]


def num_tasks_in(rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number of tasks that rows of a run tell of."""
    row = next(row for row in rows if row["split"] == "eval")
    return sum(name.startswith("task_") for name in row)


def matrix_text(acc: np.ndarray) -> str:
    """Returns a matrix of accuracies as a table: a line for each phase, a column for each task."""
    head = "after  " + "".join(f"{f'task {t + 1}':>8}" for t in range(acc.shape[1]))
    lines = [f"{i + 1:>5}  " + "".join(f"{x:8.3f}" for x in row) for i, row in enumerate(acc)]
    return "\n".join([head, *lines])


def write_report(rows: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[Path]:
    """Writes ``accuracy.npz`` (``task`` and ``any_task [phases, tasks]``) and ``accuracy.png``.

    The picture has the matrix for tasks whose position is given, and a curve for each task.

    Args:
      rows: Rows of a run.
      folder: Where to write.
      title: Title of the picture.

    Returns:
      The files.
    """
    num_tasks = num_tasks_in(rows)
    found = {name: accuracy_matrix(rows, num_tasks, name) for name in ("task", "any_task")}
    with train.replacing(folder / "accuracy.npz") as partial, partial.open("wb") as file:
        np.savez(file, **found)
    _draw(found["task"], folder / "accuracy.png", title)
    return [folder / "accuracy.npz", folder / "accuracy.png"]


def _draw(acc: np.ndarray, path: Path, title: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(acc, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=left, label="accuracy")
    ticks = range(acc.shape[1])
    left.set(xlabel="task", ylabel="after task", title=title, xticks=ticks, xticklabels=[t + 1 for t in ticks])
    left.set(yticks=range(len(acc)), yticklabels=[i + 1 for i in range(len(acc))])
    if acc.size <= 144:
        for (i, j), x in np.ndenumerate(acc):
            left.text(j, i, f"{x:.2f}", ha="center", va="center", color="white" if x < 0.6 else "black", fontsize=8)
    for t in ticks:
        first = t if len(acc) == acc.shape[1] else 0
        right.plot(range(first + 1, len(acc) + 1), acc[first:, t], marker="o", markersize=3, label=f"task {t + 1}")
    right.set(xlabel="after task", ylabel="accuracy", ylim=(0, 1.02), title="each task from its own training on")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(alpha=0.3)
    right.legend(fontsize="small", ncols=2)
    with train.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def compare_runs(folders: Sequence[str | Path]) -> list[Compared]:
    """Returns the scores of runs, method by method.

    Args:
      folders: Folders of runs that have ended.

    Raises:
      FileNotFoundError: A folder holds no run that has ended.
      ValueError: A run is of another kind, of another stream than the first, or of other settings than the first of
        its method; or a file can't be read.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    stream, settings = None, {}
    for folder in map(Path, folders):
        for name in ("config.json", "result.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: holds no run that has ended (there is no {name})")
        config, result = (_json(folder / name) for name in ("config.json", "result.json"))
        if config.get("task") != "subspace_jax.continual.task":
            raise ValueError(f"{folder}: expected a run over a stream of tasks, got one of {config.get('task')!r}")
        if "final_accuracy" not in result:
            raise ValueError(f"{folder / 'result.json'}: expected final_accuracy, got {', '.join(result) or 'nothing'}")
        own = {name: value for name, value in config["data"].items() if not name.endswith("batch_size")}
        if stream not in (None, own):
            raise ValueError(f"{folder}: expected the stream of the first run, got another {_other(stream, own)}")
        stream = own
        method = config["model"]["method"]
        used = {name: config.get(name) for name in ("model", "optim")}
        used["train"] = {name: config.get("train", {}).get(name) for name in ("steps", "epochs")}
        if settings.setdefault(method, used) != used:
            other = _other(settings[method], used)
            raise ValueError(f"{folder}: expected the settings of the first run of {method!r}, got another {other}")
        runs = found.setdefault(method, {})
        if config["seed"] in runs:
            raise ValueError(f"{folder}: seed {config['seed']} of {method!r} comes twice")
        runs[config["seed"]] = result
    return [_compared(method, runs) for method, runs in found.items()]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected fields by name, got {type(found).__name__}")
    return found


def _other(first: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The first field in which two configs differ, with both values."""
    name = next(name for name in {**first, **own} if first.get(name) != own.get(name))
    one, other = first.get(name), own.get(name)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return f"{name}.{_other(one, other)}"
    return f"{name}, {other!r} instead of {one!r}"


def _compared(method: str, runs: Mapping[int, Mapping[str, float]]) -> Compared:
    names = [name for name in SCORES if all(name in result for result in runs.values())]
    values = {name: np.asarray([result[name] for result in runs.values()]) for name in names}
    deviation = {name: float(x.std(ddof=1)) if len(x) > 1 else 0.0 for name, x in values.items()}
    return Compared(method, tuple(runs), {name: float(x.mean()) for name, x in values.items()}, deviation)


def comparison_text(compared: Sequence[Compared]) -> str:
    """Returns the scores of methods as a table, the best final accuracy first."""
    columns = "".join(f"{name.replace('_', ' '):>20}" for name in SCORES)
    lines = [f"{'method':<22}{'seeds':>6}{columns}"]
    for one in sorted(compared, key=lambda one: -one.mean["final_accuracy"]):
        cells = [f"{one.mean[name]:.3f} +- {one.deviation[name]:.3f}" if name in one.mean else "-" for name in SCORES]
        lines.append(f"{one.method:<22}{len(one.seeds):>6}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
