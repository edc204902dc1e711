"""After how many steps rows, evaluations and checkpoints are due."""

from typing import NamedTuple

from subspace_jax.train.phases import DataSpec, Phase, Run


class Periods(NamedTuple):
    """After how many steps of a phase something is due; 0 at the end of rounds or phases only."""

    log: int
    evaluate: int
    checkpoint: int

    @classmethod
    def of(cls, run: Run, phase: Phase, data: DataSpec) -> "Periods":
        """Returns those of a phase with its data."""

        def steps(period: int | None) -> int:
            return data.steps_per_epoch if period is None else period

        return cls(run.log_every, steps(run.eval_every), steps(run.checkpoint_every))

    def due_to_save(self, taken: int) -> bool:
        """Returns whether a checkpoint is begun after so many steps."""
        # Also in the middle: a checkpoint is complete at the latest when the next is due, and then the one before it
        # is one interval old.
        return due(self.checkpoint, taken) or (self.checkpoint > 1 and taken % self.checkpoint == self.checkpoint // 2)


def due(period: int, taken: int) -> bool:
    """Returns whether a period ends after so many steps; one of 0 never does."""
    return period > 0 and taken % period == 0
