"""Early stopping: a phase ends once evaluations no longer give a better value of its ``best`` metric."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from subspace_jax.train.checkpoints import parse_best
from subspace_jax.train.phases import Phase, Row, Run


class Stopped(NamedTuple):
    """Why a phase ends early.

    Attributes:
      metric: The metric that no longer gets better.
      value: Its best value.
      step: Step of the run at which it was reached.
      patience: Evaluations since then.
    """

    metric: str
    value: float
    step: int
    patience: int

    def __str__(self) -> str:
        found = f"the best {self.metric} is {self.value:.4g} at step {self.step}"
        return f"Early stopping: {found}, and {self.patience} evaluations gave no better one."


def stopped_early(run: Run, phase: Phase, rows: Sequence[Row]) -> Stopped | None:
    """Returns why a phase has ended before its last step, or None where it goes on; arguments: see :func:`best_yet`."""
    found = best_yet(run, phase, rows)
    return found if found and found.patience >= run.patience else None


def best_yet(run: Run, phase: Phase, rows: Sequence[Row]) -> Stopped | None:
    """Returns the best evaluation of a phase and how many came after it, or None where the run has no patience.

    It depends on the rows alone, which a checkpoint holds: a resumed run stops at the same step.

    Args:
      run: The run; ``run.patience`` evaluations may go by without a better value.
      phase: The phase.
      rows: The rows of the run.
    """
    best = run.best if phase.best is None else phase.best
    if not run.patience or not best:
        return None
    mode, metric = parse_best(best)
    found = [(row["step"], _value(row, metric)) for row in rows if row["phase"] == phase.name]
    found = [(step, value) for step, value in found if value is not None]
    sign = 1.0 if mode == "max" else -1.0
    best_value, best_step, since = math.nan, 0, 0
    for step, value in found:
        # Comparisons with NaN are false; any number is better.
        if sign * value > sign * best_value or (math.isnan(best_value) and not math.isnan(value)):
            best_value, best_step, since = value, step, 0
        else:
            since += 1
    return Stopped(metric, best_value, best_step, since) if found else None


def _value(row: Row, metric: str) -> float | None:
    """The metric of an evaluator's row, by the name that ``best`` ranks by."""
    prefix = "" if row["split"] == "eval" else f"{row['split']}/"
    return row.get(metric.removeprefix(prefix)) if metric.startswith(prefix) else None
