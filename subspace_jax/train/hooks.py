"""Hooks observe a run: what logs, shows, profiles and watches it, and a user's own."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from subspace_jax.train.host import noted
from subspace_jax.train.interruptions import NotFiniteError
from subspace_jax.train.metrics_log import MetricsLog, progress_bar, read_metrics
from subspace_jax.train.phases import Row, Run
from subspace_jax.train.task import Metrics
from subspace_jax.train.workdir import replacing

if TYPE_CHECKING:
    from subspace_jax.train.loop import FitResult

log = logging.getLogger(__name__)

_NOT_SCALARS = ("phase", "step", "split")


class Hook:
    """Observes a run; subclass it and override what is wanted.  It changes neither state nor order.

    Steps are those of the run.  What a hook raises ends the run, which can be resumed.
    """

    def on_start(self, run: Run, step: int, skipped: int) -> None:
        """Called when nothing is left that could refuse the run: where it begins, and how many steps were skipped."""

    def on_step(self, step: int, metrics: Metrics, batch: Mapping[str, np.ndarray]) -> None:
        """Called after each step is handed to the devices, with its metrics there and this process's examples."""

    def on_row(self, row: Row) -> None:
        """Called with each row: training metrics, and what an evaluator gives; see :class:`subspace_jax.train.At`."""

    def on_end(self, result: "FitResult") -> None:
        """Called when the run has ended as it should."""

    def on_close(self) -> None:
        """Called last, however the run ends."""


def tell(hooks: Sequence[Hook], event: str, *arguments: Any) -> None:
    """Calls a method of each hook; what one raises has a note of which it was."""
    for hook in hooks:
        with noted(f"in {type(hook).__name__}.{event}"):
            getattr(hook, event)(*arguments)


class RowLog(Hook):
    """Writes rows to ``metrics.jsonl`` and TensorBoard, and shows progress.

    Rows of a run of several phases go by the names of phase and split.
    """

    def __init__(self):
        self._open = contextlib.ExitStack()

    def on_start(self, run, step, skipped):
        """Opens the files, without the rows of later steps."""
        self._skipped, self._phases = skipped, len(run.phases)
        self._log = self._open.enter_context(contextlib.closing(MetricsLog(run.workdir, start_step=step)))
        self._open.enter_context(logging_redirect_tqdm())
        rows = read_metrics(self._log.path) if step and jax.process_index() == 0 else []
        self._there = {(row["step"], row["split"]) for row in rows if row["step"] == step}
        total = sum(phase.num_steps for phase in run.phases)
        self._bar = self._open.enter_context(progress_bar(total, step, show=run.progress))

    def on_step(self, step, metrics, batch):
        """Moves the progress bar."""
        self._bar.update()

    def on_row(self, row):
        """Writes the row; one that was written before the run was resumed is left out."""
        split = row["split"] if self._phases == 1 else f"{row['phase']}/{row['split']}"
        values = {name: value for name, value in row.items() if name not in _NOT_SCALARS}
        if (row["step"], split) in self._there:
            return
        self._log.write(row["step"], split, values)
        if row["split"] != "train":
            log.info("Step %d: %s", row["step"], ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
            return
        self._bar.set_postfix(loss=f"{values['loss']:.4g}")
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
    return hooks
