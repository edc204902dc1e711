"""Checkpoints of a run: asynchronous, atomic, the latest few and the best, exact on resume.

Orbax writes a checkpoint into a temporary folder and renames it when it is whole, so that a killed run never leaves
half of one behind.  Damage that comes later (a flipped bit, a truncated file, a lost folder) is found by the digests
of the files, and met by going back to the checkpoint before; what is damaged or can't be read is never deleted.
"""

import contextlib
import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from subspace_jax.train import arrays_handler, digests
from subspace_jax.train.reading import (
    CheckpointMismatchError,
    DamagedError,
    first_line,
    retried,
    together,
)
from subspace_jax.train.step import TrainState

log = logging.getLogger(__name__)

PyTree = Any


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
        self._keep = keep
        self._skip = skip
        self._read_only = read_only
        self.directory = Path(directory).absolute()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._handlers = {"state": arrays_handler.ArraysHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager: ocp.CheckpointManager | None = None  # made at the first save
        self._writing_step: int | None = None
        self._metrics = {step: self._read_metrics(step) for step in self.steps()}

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that are there, in rising order."""
        if self._manager is not None:
            return sorted(self._manager.all_steps())
        there = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted(int(path.name) for path in there if path.name.isdecimal() and path.is_dir())

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint, or None where there is none with the metric."""
        return self._best(self.steps())

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
        items = {"state": arrays_handler.ArraysSave(self._as_dict(state))}
        if data is not None:
            items["data"] = ocp.args.JsonSave(copy.deepcopy(data.get_state()))
        with self._writing(f"checkpoint of step {step}"):
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.wait_until_finished()
            self._writing_step, self._metrics[step] = step, dict(metrics or {})
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=self._metrics[step])

    def restore(
        self,
        abstract: TrainState,
        shardings: TrainState,
        *,
        data: grain.DatasetIterator | None = None,
        step: int | None = None,
    ) -> TrainState | None:
        """Reads a checkpoint, each device its own share.

        Without ``step`` the latest checkpoint that is whole is taken; one that is damaged is passed over with a
        warning.  A read that fails is tried again, and then is an error: what it would have read may be whole.  Mesh
        and number of processes may be others than those that wrote it.

        Args:
          abstract: What is expected, as :func:`subspace_jax.train.state_shardings` gives it.
          shardings: Where it is to live.
          data: Iterator that is set to the saved position.
          step: The step to read; then damage is an error.

        Returns:
          The state, without the entries of ``skip``, or None where there is no checkpoint.

        Raises:
          CheckpointMismatchError: The checkpoint is of another model.
          ValueError: ``data`` does not take the saved position.
          FileNotFoundError: There is no checkpoint of ``step``, or there are some and all are damaged.
          OSError: A checkpoint can't be read.
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
            try:
                return TrainState(**self._read(candidate, target, data))
            except DamagedError as damage:
                if step is not None:
                    raise FileNotFoundError(
                        f"the checkpoint of step {step} in {self.directory} is damaged ({first_line(damage)})"
                    ) from damage
                cause = damage
            log.warning(
                "The checkpoint of step %d in %s is damaged (%s); trying the one before.",
                candidate,
                self.directory,
                first_line(cause),
            )
        if found:
            raise FileNotFoundError(
                f"none of the checkpoints {found} in {self.directory} can be read ({first_line(cause)})"
            ) from cause
        return None

    def remove_after(self, step: int) -> None:
        """Renames checkpoints of later steps, such as 30 to 30.damaged: a resumed run is to write them anew."""

        def rename() -> None:
            for later in [found for found in self.steps() if found > step] if jax.process_index() == 0 else ():
                aside = self.directory / f"{later}.damaged"
                for number in itertools.count(2):
                    if not aside.exists():
                        break
                    aside = self.directory / f"{later}.damaged.{number}"
                (self.directory / str(later)).rename(aside)
                log.warning("Kept the damaged checkpoint of step %d as %s; delete it when you like.", later, aside)

        together(rename, f"rename what is damaged in {self.directory}")

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises OSError where it can't be written."""
        with self._writing("last checkpoint"):
            if self._manager is not None:
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and frees the threads; raises OSError where it can't be written."""
        with self._writing("last checkpoint"):
            if self._manager is not None:
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Names the folder where writing fails; it goes on in the background, so an earlier save may be what failed."""
        try:
            yield
        except Exception as error:  # whatever the writers below make of a full disk
            raise OSError(
                f"checkpoints: can't write the {what} or the one before it to {self.directory} ({first_line(error)}); "
                "what was complete before is still there"
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

    def _read(
        self, step: int, target: Mapping[str, PyTree], data: grain.DatasetIterator | None
    ) -> Mapping[str, PyTree]:
        """Reads the state, and sets the position in the data.

        By the handlers and not by the manager, which waits in the end until every process has read its share: where
        one can't, the others would wait for ever.  The bytes are read once more than that, for their digests, by all
        processes together.
        """
        folder = self.directory / str(step)
        what = f"read the checkpoint of step {step} in {self.directory}"

        def verify() -> Mapping[str, str] | None:
            known = digests.read(folder)
            if known is not None:
                digests.check(folder, known, sorted(known)[jax.process_index() :: jax.process_count()])
            return known

        def read() -> tuple[Mapping[str, PyTree], PyTree]:
            self._check(step, target)
            state = self._handlers["state"].restore(folder / "state", args=arrays_handler.ArraysRestore(target))
            if int(state["step"]) != step:
                raise DamagedError(f"it holds the state of step {int(state['step'])}")
            if data is None:
                return state, None
            if not (folder / "data").is_dir():
                raise DamagedError(f"{folder / 'data'} is not there")
            position = self._handlers["data"].restore(folder / "data", args=ocp.args.JsonRestore())
            index = position.get("next_index", step) if isinstance(position, Mapping) else step
            # Each step takes one element at least; where there are digests, a position is what was saved.
            if known is None and (type(index) is not int or index < step):
                raise DamagedError(f"{folder / 'data'} holds the position {position}")
            return state, position

        known = together(verify, what)
        if known is None:
            log.info("The checkpoint of step %d in %s has no digests; it is read as it is.", step, self.directory)
        state, position = together(read, what, verified=known is not None)
        if data is not None:
            try:
                data.set_state(position)
            except Exception as error:  # whatever an iterator makes of what is no position of its own
                if known is None:
                    raise DamagedError(f"{folder / 'data'} holds the position {str(position)[:100]}") from error
                raise ValueError(
                    f"data: the iterator does not take the position in {folder / 'data'} ({first_line(error)})"
                ) from error
        return state

    def _read_metrics(self, step: int) -> dict[str, float] | None:
        """Returns the metrics of a checkpoint, or None where they can't be told; a warning then names the file."""
        folder, name = self.directory / str(step), "metrics/metrics"

        def read() -> dict[str, float]:
            known = digests.read(folder) or {}
            if name not in known and not (folder / name).exists():
                return {}
            digests.check(folder, known, known.keys() & {name})
            values = json.loads((folder / name).read_bytes())
            if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
                raise DamagedError(f"{folder / name}: expected numbers by name")
            return values

        try:
            return retried(read)
        except (ValueError, RecursionError, OSError) as error:
            log.warning(
                "Can't tell the metrics of the checkpoint of step %d in %s (%s).", step, folder, first_line(error)
            )
            return None

    def _best(self, steps: Iterable[int]) -> int | None:
        """Returns the first of the best steps."""
        scored = [step for step in steps if self._metric in (self._metrics.get(step) or {})]
        pick = max if self._mode == "max" else min
        return pick(scored, key=lambda step: self._value(self._metrics[step]), default=None)

    def _make_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            best_fn=self._value,  # without it, Orbax stores no metrics
            best_mode=self._mode,
            preservation_policy=_Preserved(self._preserved),
            cleanup_tmp_directories=True,
            step_prefix=None,
            lightweight_initialize=True,  # metrics that are damaged would end it
            async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
        )
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=self._handlers)

    def _complete(self) -> None:
        """Adds the digests to a checkpoint that is written, before Orbax gives it its name."""
        (folder,) = self.directory.glob(f"{self._writing_step}.orbax-checkpoint-tmp*")
        digests.write(folder)

    def _preserved(self, steps: Sequence[int]) -> set[int]:
        """The latest, the best, and those whose metrics can't be told."""
        unknown = {step for step in steps if self._metrics.get(step) is None}
        return {*steps[-self._keep :], self._best(reversed(steps)), *unknown}

    def _check(self, step: int, target: Mapping[str, PyTree]) -> None:
        """Compares names, shapes and dtypes before any array is read."""
        saved = self._handlers["state"].metadata(self.directory / str(step) / "state")
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


@dataclass(frozen=True)
class _Preserved:
    """A policy of Orbax: the steps that a function picks."""

    pick: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        picked = self.pick(steps)
        return [step in picked for step in steps]


def _describe(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for path, x in leaves
        if hasattr(x, "shape")
    }
