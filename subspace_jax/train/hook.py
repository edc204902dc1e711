"""What observes a run: the base class of hooks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace_jax.train.host import noted
from subspace_jax.train.phases import Row, Run
from subspace_jax.train.task import Metrics

if TYPE_CHECKING:
    from subspace_jax.train.loop import FitResult

_NOT_SCALARS = ("phase", "step", "split")


class Hook:
    """Observes a run; subclass it and override what is wanted.  It changes neither state nor order.

    Steps are those of the run.  What a hook raises ends the run, which can be resumed.
    """

    def on_start(self, run: Run, step: int, skipped: int) -> None:
        """Called when nothing is left that could refuse the run: where it begins, and how many steps were skipped."""

    def on_step(self, step: int, metrics: Metrics, batch: Mapping[str, np.ndarray]) -> None:
        """Called after each step is handed to the devices, with its metrics there and this process's examples."""

    def on_evaluate(self, name: str, step: int) -> None:
        """Called before an evaluator runs, whose row follows."""

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


def row_values(row: Row) -> dict[str, float]:
    """Returns the scalars of a row."""
    return {name: value for name, value in row.items() if name not in _NOT_SCALARS}


def split_name(row: Row, phases: int) -> str:
    """Returns by which name a row is logged: its split, in a run of several phases after that of the phase."""
    return row["split"] if phases == 1 else f"{row['phase']}/{row['split']}"
