"""Rows of a run in Weights & Biases."""

from pathlib import Path
from typing import Any

import jax

from subspace_jax.train.hook import Hook, row_values, split_name
from subspace_jax.train.workdir import WANDB_ID, replacing


class WandbLog(Hook):
    """Sends rows to Weights & Biases, with the package ``wandb``; only process 0 does.

    The run's id is kept in ``wandb_id.txt`` below the workdir, so that a resumed run goes on in the same one.

    Args:
      project: The project.
    """

    def __init__(self, project: str):
        self._project = project
        self._run: Any = None
        self._ended = False

    def on_start(self, run, step, skipped):
        """Opens the run."""
        if jax.process_index() != 0:
            return
        import wandb

        file, self._phases = Path(run.workdir) / WANDB_ID, len(run.phases)
        known = file.read_text().strip() if file.exists() else None
        config = None if run.config is None else run.config.to_dict()
        self._run = wandb.init(
            project=self._project, id=known, resume="allow", dir=str(run.workdir), config=config, name=file.parent.name
        )
        # Rows after the last checkpoint come twice in a resumed run, which the counter of wandb would refuse.
        self._run.define_metric("*", step_metric="step")
        with replacing(file) as partial:
            partial.write_text(f"{self._run.id}\n")

    def on_row(self, row):
        """Sends a row."""
        if self._run is not None:
            split = split_name(row, self._phases)
            values = {f"{split}/{name}": value for name, value in row_values(row).items()}
            self._run.log({"step": row["step"], **values})

    def on_end(self, result):
        """Notes that the run has ended as it should."""
        self._ended = True

    def on_close(self):
        """Closes the run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._ended else 1)
