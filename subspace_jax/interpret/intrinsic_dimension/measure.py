"""Measuring the intrinsic dimension of a task (arXiv 1804.08838): runs in subspaces, a table, a curve."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from subspace_jax import metrics as measures
from subspace_jax import optim
from subspace_jax.interpret.intrinsic_dimension.task import SubspaceTask
from subspace_jax.metrics import intrinsic_dimension as searching
from subspace_jax.optim.random_subspace.subspace import METHODS, SCOPES, Select
from subspace_jax.train.config import differing_fields, read_config, save_config
from subspace_jax.train.experiment import build
from subspace_jax.train.fields import check_at_least, check_choice, complete_config
from subspace_jax.train.lock import locked
from subspace_jax.train.loop import fit
from subspace_jax.train.optimizer import make_optimizer
from subspace_jax.train.phases import Phase, Run
from subspace_jax.train.workdir import naming, replacing, unmark_saved, writable_folder

log = logging.getLogger(__name__)

SEARCHES = ("all", *searching.SEARCHES)


@dataclass(frozen=True)
class IntrinsicDimension:
    """What :func:`measure_intrinsic_dimension` found.

    Attributes:
      dim: The smallest dimension whose mean score is above ``fraction * baseline``, or None.
      score: Its mean score, or None.
      baseline: Score of training in all parameters.
      fraction: The share of it that counts as solved.
      num_params: Parameters that move.
      rows: The table: a dict with ``dim`` (0 for all parameters), ``seed`` and ``score`` for each run.
    """

    dim: int | None
    score: float | None
    baseline: float
    fraction: float
    num_params: int
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Measurement:
    """How a dimension is measured.

    Attributes:
      method: See :func:`subspace_jax.optim.random_subspace`.
      scope: See there.
      repeats: Runs of each dimension, with seeds ``seed``, ``seed + 1`` and so on, for start, subspace and data order.
      fraction: Fraction of the baseline that counts as solved.
      metric: Metric of the evaluation that is the score: larger is better, and the baseline positive.
      search: "all" tries all dimensions, for a whole curve; "ascending" and "bisect" are those of
        :func:`subspace_jax.metrics.search_d_int`.
      baseline: Score of training in all parameters; 0 for that of ``repeats`` runs.
    """

    method: str = "fastfood"
    scope: str = "global"
    repeats: int = 1
    fraction: float = 0.9
    metric: str = "accuracy"
    search: str = "all"
    baseline: float = 0.0


def default_intrinsic() -> ConfigDict:
    """Returns the fields ``intrinsic`` of a run, for :func:`measure_config`.

    ``dims`` are those of :func:`measure_intrinsic_dimension`, the others those of :class:`Measurement`.  The baseline
    is measured with ``optim`` but for ``full_learning_rate`` where that is above 0.
    """
    return ConfigDict(
        {
            "dims": (10, 20, 50, 100, 200, 500, 1000),
            **dataclasses.asdict(Measurement()),
            "full_learning_rate": 0.0,
        }
    )


def measure_intrinsic_dimension(
    run: Run,
    dims: Sequence[int],
    measurement: Measurement = Measurement(),
    *,
    select: Select | None = None,
    full_tx: optax.GradientTransformation | None = None,
) -> IntrinsicDimension:
    """Trains a task in random subspaces of growing dimension, and finds the smallest that is enough.

    A measurement that was killed goes on when it is called again with the same ``workdir``: runs in its table are not
    repeated, and the one that was interrupted resumes from its last checkpoint.  More dimensions or repeats may be
    asked for then.

    Written below ``workdir``: ``table.jsonl``, a row for each run; ``curve.png``; ``solutions/``, the vector of each
    run with its key, for :func:`subspace_jax.optim.decompress`; ``runs/``, a folder as :func:`subspace_jax.train.fit`
    writes it for each run, whose checkpoints go once it has ended.

    Args:
      run: A run of one phase: its task, data and number of steps, the optimizer of the vector (learning rates are ten
        times and more those of usual training), the first seed, and the folder of the measurement.
      dims: Dimensions of subspaces, in any order.
      measurement: How they are measured.
      select: See :func:`subspace_jax.optim.random_subspace`.
      full_tx: Optimizer of the runs in all parameters; that of ``run`` by default.

    Returns:
      The dimension, and the table.

    Raises:
      ValueError: A setting can't serve, or ``workdir`` holds the table of a measurement with other ones.
      OSError: ``workdir`` can't be written.
    """
    how = measurement
    if how.search not in SEARCHES:
        raise ValueError(f"search: expected one of {SEARCHES}, got {how.search!r}")
    if how.repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {how.repeats}")
    if not dims:
        raise ValueError("dims: expected at least one dimension, got none")
    if len(run.phases) != 1:
        raise ValueError(f"run: expected one phase, got {len(run.phases)}")
    (phase,) = run.phases
    # What can't serve shows before the first run.
    options = {"method": how.method, "scope": how.scope, "select": select}
    tasks = {dim: SubspaceTask(phase.task, dim, **options) for dim in sorted(set(dims))}
    phases = {dim: phase._replace(task=task) for dim, task in tasks.items()}
    phases[0] = phase._replace(tx=full_tx or phase.tx)
    num_params = next(iter(tasks.values())).num_params
    settings = {"method": how.method, "scope": how.scope, "metric": how.metric}
    settings |= {"num_steps": phase.num_steps, "num_params": num_params}
    run = dataclasses.replace(run, workdir=writable_folder(run.workdir), config=None, summary=None)
    with locked(run.workdir):
        table = _Table(run.workdir / "table.jsonl", settings)
        score = _Scores(run, phases, table, how)
        baseline = how.baseline or score(0)
        if not baseline > 0:
            raise ValueError(f"baseline: expected a positive score, got {baseline}")
        if how.search == "all":
            for dim in tasks:
                score(dim)
        else:
            measures.search_d_int(score, list(tasks), baseline, how.fraction, how.search)
        seeds = range(run.seed, run.seed + how.repeats)
        rows = [row for row in table.rows if row["dim"] in tasks and row["seed"] in seeds]
        dims_of, scores = [row["dim"] for row in rows], [row["score"] for row in rows]
        found, value = measures.d_int(dims_of, scores, baseline, how.fraction)
        result = IntrinsicDimension(found, value, baseline, how.fraction, num_params, tuple(table.rows))
        if jax.process_index() == 0:
            shown = dataclasses.replace(result, rows=tuple(rows))
            plot_intrinsic_dimension(shown, run.workdir / "curve.png", metric=how.metric)
        return result


@dataclass(frozen=True)
class _Scores:
    """The mean score of a dimension's runs, 0 for all parameters; runs of the table are not repeated."""

    run: Run
    phases: Mapping[int, Phase]
    table: "_Table"
    how: Measurement

    def __call__(self, dim: int) -> float:
        return float(np.mean([self._one(dim, self.run.seed + i) for i in range(self.how.repeats)]))

    def _one(self, dim: int, seed: int) -> float:
        if (known := self.table.score(dim, seed)) is not None:
            return known
        name = f"{'full' if dim == 0 else f'd{dim}'}_seed{seed}"
        folder, phase = self.run.workdir / "runs" / name, self.phases[dim]
        result = fit(
            dataclasses.replace(
                self.run,
                phases=(phase,),
                workdir=folder,
                seed=seed,
                eval_every=0,
                checkpoint_every=max(1, phase.num_steps // 5),
                keep=1,
                best=f"max:{self.how.metric}",
            )
        )
        value = result.metrics[self.how.metric]
        if dim:
            _save_solution(self.run.workdir / "solutions" / f"{name}.npz", result.state)
        self.table.add(dim, seed, value)
        if jax.process_index() == 0:
            unmark_saved(folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        log.info("%s: %s %.4f", name, self.how.metric, value)
        return value


def measure_config(config: ConfigDict, workdir: str | Path, *, progress: bool = True) -> IntrinsicDimension:
    """Measures what a config describes: a run's, with the fields ``intrinsic`` of :func:`default_intrinsic` beside.

    Args:
      config: The config; it is saved as ``config.json``.
      workdir: Folder of the measurement, see :func:`measure_intrinsic_dimension`.
      progress: Whether to show progress bars.

    Returns:
      The dimension, and the table.

    Raises:
      ValueError: A field can't serve, or ``workdir`` holds a measurement whose runs were made otherwise.
      OSError: ``workdir`` can't be written.
    """
    if "intrinsic" not in config:
        raise ValueError("config: expected the fields of intrinsic_dimension.default_intrinsic(), there are none")
    own = complete_config(ConfigDict({"intrinsic": config.intrinsic}), ConfigDict({"intrinsic": default_intrinsic()}))
    fields = own.intrinsic.to_dict()
    _check_fields(fields)
    run = build(config)
    rate, dims = fields.pop("full_learning_rate"), fields.pop("dims")
    folder = writable_folder(workdir)
    saved = folder / "config.json"
    if saved.is_file():
        free = tuple(f"intrinsic.{name}:" for name in ("dims", "repeats", "fraction", "search", "baseline"))
        changes = [text for text in differing_fields(read_config(saved), config) if not text.startswith(free)]
        if changes:
            raise ValueError(f"workdir: {folder} holds a measurement with other settings: {'; '.join(changes)}")
    if jax.process_index() == 0:
        save_config(config, saved)
    full = config.optim.copy_and_resolve_references()
    full.learning_rate = rate or full.learning_rate
    full_tx = make_optimizer(full, run.phases[0].num_steps, run.phases[0].task.roles())
    run = dataclasses.replace(run, workdir=folder, progress=progress)
    return measure_intrinsic_dimension(run, dims, Measurement(**fields), full_tx=full_tx)


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Finds what is wrong with the fields before any data are read."""
    for name in ("baseline", "full_learning_rate"):
        check_at_least(f"intrinsic.{name}", fields[name], 0)
    check_at_least("intrinsic.repeats", fields["repeats"], 1)
    if not fields["dims"] or min(fields["dims"]) < 1:
        raise ValueError(f"intrinsic.dims: expected dimensions of at least 1, got {fields['dims']}")
    if not 0 < fields["fraction"] <= 1:
        raise ValueError(f"intrinsic.fraction: expected a number in (0, 1], got {fields['fraction']}")
    check_choice("intrinsic.search", fields["search"], SEARCHES)
    check_choice("intrinsic.method", fields["method"], METHODS)
    check_choice("intrinsic.scope", fields["scope"], SCOPES)


def plot_intrinsic_dimension(result: IntrinsicDimension, output: str | Path, *, metric: str = "score") -> None:
    """Draws the score over the dimension: the mean of each dimension's runs, and their range.

    Args:
      result: Of :func:`measure_intrinsic_dimension`.
      output: The PNG to write.
      metric: Label of the scores.
    """
    from matplotlib.figure import Figure

    dims = sorted({row["dim"] for row in result.rows} - {0})
    scores = [[row["score"] for row in result.rows if row["dim"] == dim] for dim in dims]
    means = np.array([np.mean(s) for s in scores])
    spread = [means - [min(s) for s in scores], [max(s) for s in scores] - means]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(dims, means, yerr=spread, marker="o", capsize=3, label="in a random subspace")
    axis.axhline(result.baseline, color="C2", linestyle="--", label=f"all {result.num_params} parameters")
    axis.axhline(result.fraction * result.baseline, color="C3", linestyle=":", label=f"{result.fraction:.0%} of that")
    if result.dim is not None:
        axis.axvline(result.dim, color="C3", alpha=0.5, label=f"intrinsic dimension {result.dim}")
    axis.set(xscale="log", xlabel="dimension of the subspace", ylabel=metric)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    with replacing(output) as partial:
        figure.savefig(partial, dpi=120)


class _Table:
    """The runs that are done, in a JSONL file whose first line says how they were made."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path = path
        lines = _read_table(path)
        before = lines[0]["settings"] if lines else None
        if lines and before != settings:
            raise ValueError(f"workdir: {path} is of a measurement with {before}, got {settings}")
        self.rows = lines[1:]
        if jax.process_index() == 0:
            # Without what a killed process may have left half written.
            with replacing(path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines or [{"settings": dict(settings)}]))

    def score(self, dim: int, seed: int) -> float | None:
        return next((row["score"] for row in self.rows if (row["dim"], row["seed"]) == (dim, seed)), None)

    def add(self, dim: int, seed: int, score: float) -> None:
        self.rows.append({"dim": dim, "seed": seed, "score": score})
        if jax.process_index() == 0:
            with naming(self._path), self._path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _read_table(path: Path) -> list[dict[str, Any]]:
    """Reads settings and rows, without a last line that is not finished; raises ValueError for another wrong line."""
    lines, found = path.read_bytes().splitlines(keepends=True) if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            row = None
        if not _is_entry(row, first=number == 1):
            wanted = "the settings" if number == 1 else "dim, seed and score"
            raise ValueError(f"workdir: {path}:{number}: expected {wanted} as JSON, got {line[:80]!r}")
        found.append(row)
    return found


def _is_entry(row: Any, *, first: bool) -> bool:
    if not isinstance(row, dict):
        return False
    if first:
        return isinstance(row.get("settings"), dict)
    return all(type(row.get(name)) is int for name in ("dim", "seed")) and type(row.get("score")) in (int, float)


def _save_solution(path: Path, state: Any) -> None:
    theta = jax.device_get(state.params["theta"])
    kept = optim.compress(state.variables["subspace"], theta)
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            np.savez(partial, **{name: np.asarray(jax.device_get(x)) for name, x in kept.items()})
