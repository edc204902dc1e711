"""Checkpoints of a run: asynchronous, atomic, the latest few and the best, exact on resume.

Orbax writes a checkpoint into a temporary folder and renames it when it is whole, so that a killed run never leaves
half of one behind.  Damage that comes later (a truncated file, a lost folder) is met by going back to the checkpoint
before it.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from subspace_jax.train.step import TrainState

log = logging.getLogger(__name__)

PyTree = Any


class CheckpointMismatchError(ValueError):
    """The checkpoint holds another model than the one that asks for it; the message lists what differs."""


class Checkpoints:
    """The checkpoints below one folder.

    Args:
      directory: The folder; made when it is not there.
      keep: How many of the latest checkpoints stay.
      best: ``"max:METRIC"`` or ``"min:METRIC"``: the checkpoint with the best value of this metric stays too.
      skip: Entries of ``variables`` that are neither written nor read; see :class:`subspace_jax.train.Task`.
      read_only: Nothing is changed in the folder, which a run may be writing to at the same time: it is neither made
        nor freed of what looks like a leftover.

    Raises:
      ValueError: ``keep`` is below 1, or ``best`` has another form.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        best: str = "min:loss",
        skip: tuple[str, ...] = (),
        read_only: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self._mode, self._metric = parse_best(best)
        self._skip = skip
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(
                get_metric_fn=self._value, reverse=self._mode == "min", n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=self._value,  # without it, Orbax stores no metrics
            best_mode=self._mode,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            step_prefix=None,
        )
        self.directory = Path(directory).absolute()
        # Named here, for a manager that has not saved yet can't describe what it finds otherwise.
        self._handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=self._handlers)

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that are there, in rising order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint, or None where there is none with the metric."""
        metrics = {step: self._manager.metrics(step) or {} for step in self.steps()}
        scored = [step for step in metrics if self._metric in metrics[step]]
        pick = max if self._mode == "max" else min
        return pick(scored, key=lambda step: self._value(metrics[step]), default=None)

    def save(
        self,
        state: TrainState,
        data: grain.DatasetIterator | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a checkpoint in the background, of the state's own step; returns once the arrays are copied.

        Args:
          state: The train state; it may be donated after the call.
          data: The iterator whose position is saved with it; the position is the same on every process.
          metrics: Numbers by which the best checkpoint is found.
        """
        step = int(state.step)
        if step in self.steps():
            return
        items = {"state": ocp.args.StandardSave(self._as_dict(state))}
        if data is not None:
            items["data"] = ocp.args.JsonSave(copy.deepcopy(data.get_state()))
        with self._writing(f"checkpoint of step {step}"):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(metrics or {}))

    def restore(
        self,
        abstract: TrainState,
        shardings: TrainState,
        *,
        data: grain.DatasetIterator | None = None,
        step: int | None = None,
    ) -> TrainState | None:
        """Reads a checkpoint, each device its own share.

        Without ``step`` the latest checkpoint that can be read is taken; one that can't is passed over with a
        warning.  Mesh and number of processes may be others than those that wrote it.

        Args:
          abstract: What is expected, as :func:`subspace_jax.train.state_shardings` gives it.
          shardings: Where it is to live.
          data: Iterator that is set to the saved position.
          step: The step to read; then damage is an error.

        Returns:
          The state, without the entries of ``skip``, or None where there is no checkpoint.

        Raises:
          CheckpointMismatchError: The checkpoint is of another model.
          FileNotFoundError: There is no checkpoint of ``step``, or there are some and none can be read.
        """
        found = self.steps()
        if step is not None and step not in found:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there are {found}")
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._as_dict(abstract),
            self._as_dict(shardings),
        )
        cause = None
        for candidate in [step] if step is not None else reversed(found):
            damage = None
            try:
                self._check(candidate, target)
                state, position = self._read(candidate, target, data is not None)
            except CheckpointMismatchError:
                raise
            except Exception as error:  # whatever a damaged file makes the readers below raise
                damage = error
            if _on_every_process(damage is None):
                if data is not None:
                    data.set_state(position)
                return TrainState(**state)
            cause = damage or OSError("another process can't read it")
            if step is not None:
                raise FileNotFoundError(f"the checkpoint of step {step} in {self.directory} is damaged") from cause
            log.warning(
                "The checkpoint of step %d in %s is damaged (%s); trying the one before.",
                candidate,
                self.directory,
                str(cause).strip().split("\n")[0][:200],
            )
        if found:
            raise FileNotFoundError(f"none of the checkpoints {found} in {self.directory} can be read") from cause
        return None

    def remove_after(self, step: int) -> None:
        """Deletes checkpoints of later steps: damaged ones, which a resumed run is to write anew."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises OSError where it can't be written."""
        with self._writing("last checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and frees the threads; raises OSError where it can't be written."""
        with self._writing("last checkpoint"):
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Names the folder where writing fails; it goes on in the background, so an earlier save may be what failed."""
        try:
            yield
        except Exception as error:  # whatever the writers below make of a full disk
            first = next((line for line in str(error).strip().split("\n") if line), type(error).__name__)
            raise OSError(
                f"checkpoints: can't write the {what} or the one before it to {self.directory} ({first[:300]}); what "
                "was complete before is still there"
            ) from error

    def _value(self, metrics: Mapping[str, float]) -> float:
        """What checkpoints are ranked by; one that was not evaluated, or gave no number, is the worst."""
        value = metrics.get(self._metric, math.nan)
        return value if not math.isnan(value) else (-math.inf if self._mode == "max" else math.inf)

    def _as_dict(self, state: TrainState) -> dict[str, PyTree]:
        found = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
        if self._skip:
            found["variables"] = {name: x for name, x in state.variables.items() if name not in self._skip}
        return found

    def _read(self, step: int, target: Mapping[str, PyTree], with_data: bool) -> tuple[PyTree, PyTree | None]:
        """Reads state and position in the data.

        By the handlers and not by the manager, which waits in the end until every process has read its share: where
        one can't, the others would wait for ever.
        """
        folder = self.directory / str(step)
        state = self._handlers["state"].restore(folder / "state", args=ocp.args.StandardRestore(target))
        if not with_data:
            return state, None
        return state, self._handlers["data"].restore(folder / "data", args=ocp.args.JsonRestore())

    def _check(self, step: int, target: Mapping[str, PyTree]) -> None:
        """Compares names, shapes and dtypes before any array is read."""
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise ValueError("its description can't be read")
        there = _describe(getattr(saved, "tree", saved))
        wanted = _describe(target)
        differences = [f"{name}: not in the checkpoint" for name in sorted(wanted.keys() - there.keys())]
        differences += [f"{name}: only in the checkpoint" for name in sorted(there.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & there.keys()):
            if wanted[name] != there[name]:
                differences.append(f"{name}: {there[name]} in the checkpoint, {wanted[name]} in the model")
        if differences:
            shown = "\n  ".join(differences[:20])
            more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
            raise CheckpointMismatchError(
                f"the checkpoint of step {step} in {self.directory} is of another model:\n  {shown}{more}"
            )


def parse_best(best: str) -> tuple[str, str]:
    """Splits ``"max:accuracy"`` into ``("max", "accuracy")``; raises ValueError for another form."""
    mode, _, metric = best.partition(":")
    if mode not in ("max", "min") or not metric:
        raise ValueError(f"best: expected 'max:METRIC' or 'min:METRIC', such as 'max:accuracy', got {best!r}")
    return mode, metric


def _on_every_process(fact: bool) -> bool:
    """Whether something holds on all processes, so that they go on together."""
    return fact if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(fact))))


def _describe(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for path, x in leaves
        if hasattr(x, "shape")
    }
