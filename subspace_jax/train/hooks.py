"""The hooks of every run: what logs, shows, profiles and watches it."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from subspace_jax.train.hook import Hook, row_values, split_name
from subspace_jax.train.interruptions import NotFiniteError
from subspace_jax.train.metrics_log import MetricsLog, read_metrics
from subspace_jax.train.phases import Run
from subspace_jax.train.progress import Progress, amount_of
from subspace_jax.train.summary import run_summary
from subspace_jax.train.wandb_log import WandbLog
from subspace_jax.train.workdir import replacing

log = logging.getLogger(__name__)


class RowLog(Hook):
    """Writes rows to ``metrics.jsonl`` and TensorBoard, and shows the run.

    Rows of a run of several phases go by the names of phase and split.
    """

    def __init__(self):
        self._open = contextlib.ExitStack()

    def on_start(self, run, step, skipped):
        """Opens the files, without the rows of later steps, and shows what the run is."""
        self._skipped, self._phases = skipped, len(run.phases)
        self._log = self._open.enter_context(contextlib.closing(MetricsLog(run.workdir, start_step=step)))
        rows = read_metrics(self._log.path) if step and jax.process_index() == 0 else []
        self._there = {(row["step"], row["split"]) for row in rows if row["step"] == step}
        self._progress = Progress(sum(phase.num_steps for phase in run.phases), step, show=run.progress)
        self._open.enter_context(self._progress.open())
        if run.progress and jax.process_index() == 0:
            self._progress.say(run_summary(run, step))

    def on_step(self, step, metrics, batch):
        """Counts the step."""
        amount, unit = amount_of(batch)
        self._progress.step(step, (amount * jax.process_count(), unit))

    def on_evaluate(self, name, step):
        """Shows that an evaluator runs."""
        self._progress.evaluating(name)

    def on_row(self, row):
        """Writes the row; one that was written before the run was resumed is left out."""
        split, values = split_name(row, self._phases), row_values(row)
        if (row["step"], split) in self._there:
            return
        self._log.write(row["step"], split, values)
        if row["split"] != "train":
            self._progress.evaluated(row["step"], split, values)
            return
        self._progress.trained(row["step"], values)
        if values["skipped"] > self._skipped:
            text = "Up to step %d, %d steps were skipped: a result of theirs was not finite."
            log.warning(text, row["step"], values["skipped"])
            self._skipped = values["skipped"]

    def on_close(self):
        """Closes the files."""
        self._open.close()


class Profile(Hook):
    """Traces five steps for the profiler, into ``profile/``.

    Args:
      first: The first of them.
    """

    def __init__(self, first: int):
        self._first = first
        self._trace = contextlib.ExitStack()

    def on_start(self, run, step, skipped):
        """Begins with the first step of a run."""
        self._folder = Path(run.workdir) / "profile"
        self._begin_before(step + 1)

    def on_step(self, step, metrics, batch):
        """Begins before the first step, and ends after the fifth."""
        if step == self._first + 4:
            jax.block_until_ready(metrics)
            self._trace.close()
        self._begin_before(step + 1)

    def on_end(self, result):
        """Ends where the run ends earlier."""
        jax.block_until_ready(result.state)
        self._trace.close()

    def on_close(self):
        """Ends the trace."""
        self._trace.close()

    def _begin_before(self, step: int) -> None:
        if step == self._first:
            self._trace.enter_context(jax.profiler.trace(str(self._folder)))


class FiniteWatch(Hook):
    """Stops a run all of whose last steps were skipped.

    Args:
      limit: Steps in a row.  Looked at every ``limit`` steps, so that devices are not waited for in between: a run
        stops after ``limit`` to ``2 limit - 1`` of them.
    """

    def __init__(self, limit: int):
        self._limit, self._seen = limit, 0

    def on_start(self, run, step, skipped):
        """Remembers the steps that were skipped before."""
        self._before, self._workdir = skipped, Path(run.workdir)

    def on_step(self, step, metrics, batch):
        """Counts a step; raises NotFiniteError where the last ``limit`` steps were all skipped."""
        self._seen += 1
        if self._seen % self._limit:
            return
        count = int(metrics["skipped"])
        if count - self._before >= self._limit:
            file = self._workdir / f"not_finite_{step}_{jax.process_index()}.npz"
            with replacing(file) as partial:
                np.savez(partial, **{name: np.asarray(rows) for name, rows in batch.items()})
            raise NotFiniteError(
                f"loss, gradient or update of {self._limit} steps in a row up to step {step} was not finite "
                f"(train.max_skipped); the last batch is in {file}, and the parameters are those before these steps"
            )
        self._before = count


class ConfigFile(Hook):
    """Writes the config of a run to ``config.json`` once the run begins, not where it is refused."""

    def on_start(self, run, step, skipped):
        """Writes the file."""
        from subspace_jax.train.config import save_config

        if run.config is not None and jax.process_index() == 0:
            save_config(run.config, Path(run.workdir) / "config.json")


def own_hooks(run: Run) -> list[Hook]:
    """Returns the hooks that every run has."""
    hooks: list[Any] = [ConfigFile(), RowLog()]
    if run.profile_at:
        hooks.append(Profile(run.profile_at))
    if run.max_skipped:
        hooks.append(FiniteWatch(run.max_skipped))
    if run.wandb:
        hooks.append(WandbLog(run.wandb))
    return hooks
