"""Checkpoints of a run: asynchronous, atomic, the latest few and the best, exact on resume.

Orbax writes a checkpoint into a temporary folder and renames it when it is complete, so that a killed run leaves no
partial one behind.  Damage that comes later (a flipped bit, a truncated file, a lost folder) is found by the digests of
the files, and met by going back to the checkpoint before; what is damaged or can't be read is never deleted.
"""

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from subspace_jax.train import digests
from subspace_jax.train.reading import (
    CheckpointMismatchError,
    DamagedError,
    first_line,
    retried,
    together,
)
from subspace_jax.train.state import TrainState

log = logging.getLogger(__name__)

PyTree = Any

_PHASE = "phase"  # beside the metrics of a checkpoint


class Record(NamedTuple):
    """What a checkpoint holds beside the state, as JSON.

    Attributes:
      phase: Index of the phase.
      rows: The rows of the run until then.
      data: Position in the data: the state of its iterator, or None.
    """

    phase: int = 0
    rows: Sequence[Mapping[str, Any]] = ()
    data: Any = None


Find = Callable[[Record], tuple[TrainState, TrainState]]
Take = Callable[[TrainState, Record], None]


class Checkpoints:
    """The checkpoints below one folder.

    Args:
      directory: The folder; made when it is not there.
      keep: How many of the latest checkpoints stay.
      best: ``"max:METRIC"`` or ``"min:METRIC"``: the checkpoint with the best value of this metric stays too, within
        its phase.  One for all phases, or one for each; an empty one ranks none.
      read_only: Nothing is changed in the folder, which a run may be writing to at the same time: it is neither made
        nor freed of what looks like a leftover.

    Raises:
      ValueError: ``keep`` is below 1, or ``best`` has another form.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 2, best: str | Sequence[str] = "min:loss", read_only: bool = False
    ):
        # Late: importing the train package does not import Orbax.
        import orbax.checkpoint as ocp

        from subspace_jax.train import arrays_handler

        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self._ranks = [best and parse_best(best)] if isinstance(best, str) else [b and parse_best(b) for b in best]
        self._keep = keep
        self._read_only = read_only
        self.directory = Path(directory).absolute()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._ocp, self._arrays = ocp, arrays_handler
        self._handlers = {"state": arrays_handler.ArraysHandler(), "run": ocp.JsonCheckpointHandler()}
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
        """Returns the step of the best checkpoint of the latest phase, or None where none has the metric."""
        phases = [phase for step in self.steps() if (phase := self._phase(step)) is not None]
        return self._best(self.steps(), phases[-1]) if phases else None

    def save(self, state: TrainState, record: Record | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Writes a checkpoint in the background, of the state's own step; returns once the arrays are copied.

        Args:
          state: The train state, without what no checkpoint holds; it may be donated after the call.
          record: What is saved with it; the same on every process.
          metrics: Scalars by which the best checkpoint is found.
        """
        step = int(state.step)
        if step in self.steps():
            return
        ocp = self._ocp
        # As text now, for the iterator and the rows go on while this is written.
        record = json.loads(json.dumps((record or Record())._asdict()))
        items = {"state": self._arrays.ArraysSave(_as_dict(state)), "run": ocp.args.JsonSave(record)}
        with self._writing(f"checkpoint of step {step}"):
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.wait_until_finished()
            self._writing_step, self._metrics[step] = step, {**(metrics or {}), _PHASE: record["phase"]}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=self._metrics[step])

    def restore(
        self, find: Find, *, take: Take | None = None, step: int | None = None
    ) -> tuple[TrainState, Record] | None:
        """Reads a checkpoint, each device its own shards.

        Without ``step`` the latest complete checkpoint is taken; a damaged one is passed over with a warning.  A read
        that fails is tried again, and then is an error: what it would have read may be complete.  Mesh and number of
        processes may be others than those that wrote it.

        Args:
          find: ``find(record)`` returns what is expected and where it is to live, as
            :func:`subspace_jax.train.state_shardings` gives them, without what no checkpoint holds.
          take: ``take(state, record)`` sets the position in the data.
          step: The step to read; then damage is an error.

        Returns:
          The state and the record, or None where there is no checkpoint.

        Raises:
          CheckpointMismatchError: The checkpoint is of another model.
          ValueError: ``take`` raised.
          FileNotFoundError: There is no checkpoint of ``step``, or there are some and all are damaged.
          OSError: A checkpoint can't be read.
        """
        found = self.steps()
        if step is not None and step not in found:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there are {found}")
        cause = None
        for candidate in [step] if step is not None else reversed(found):
            try:
                return self._read(candidate, find, take)
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

    def _read(self, step: int, find: Find, take: Take | None) -> tuple[TrainState, Record]:
        """Reads the record and then the state.

        By the handlers and not by the manager, which waits in the end until every process has read its shards: where
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

        def read() -> tuple[TrainState, Record]:
            record = self._read_record(folder)
            try:
                expected = find(record)
            except CheckpointMismatchError as error:
                raise CheckpointMismatchError(f"{folder}: {error}") from error
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), *map(_as_dict, expected)
            )
            self._check(step, target)
            arrays = self._handlers["state"].restore(folder / "state", args=self._arrays.ArraysRestore(target))
            state = TrainState(**arrays)
            if int(state.step) != step:
                raise DamagedError(f"it holds the state of step {int(state.step)}")
            index = record.data.get("next_index", step) if isinstance(record.data, Mapping) else step
            taken = step - int(state.phase_start)
            # Each step takes one element at least; where there are digests, a position is what was saved.
            if known is None and take is not None and (record.data is None or type(index) is not int or index < taken):
                raise DamagedError(f"{folder / 'run'} holds the position {record.data}")
            return state, record

        known = together(verify, what)
        if known is None:
            log.info("The checkpoint of step %d in %s has no digests; it is read as it is.", step, self.directory)
        state, record = together(read, what, verified=known is not None)
        if take is not None:
            try:
                take(state, record)
            except Exception as error:  # whatever an iterator makes of what is no position of its own
                if known is None:
                    raise DamagedError(f"{folder / 'run'} holds the position {str(record.data)[:100]}") from error
                raise ValueError(
                    f"data: the iterator does not take the position in {folder / 'run'} ({first_line(error)})"
                ) from error
        return state, record

    def _read_record(self, folder: Path) -> Record:
        if not (folder / "run").is_dir():
            raise DamagedError(f"{folder / 'run'} is not there")
        found = self._handlers["run"].restore(folder / "run", args=self._ocp.args.JsonRestore())
        try:
            record = Record(**found)
        except TypeError:
            record = Record(phase=-1)
        if type(record.phase) is not int or record.phase < 0 or not isinstance(record.rows, list):
            raise DamagedError(f"{folder / 'run'}: expected phase, rows and data, got {str(found)[:100]}")
        return record

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

    def _phase(self, step: int) -> int | None:
        return (self._metrics.get(step) or {}).get(_PHASE)

    def _best(self, steps: Iterable[int], phase: int | None) -> int | None:
        """Returns the first of the best steps of a phase; one whose metric is no number comes last."""
        rank = self._ranks[min(phase, len(self._ranks) - 1)] if phase is not None else None
        if not rank:
            return None
        mode, metric = rank
        scored = [step for step in steps if self._phase(step) == phase and metric in self._metrics[step]]
        values = {step: self._metrics[step][metric] for step in scored}
        if mode == "max":
            return max(scored, key=lambda step: -math.inf if math.isnan(values[step]) else values[step], default=None)
        return min(scored, key=lambda step: math.inf if math.isnan(values[step]) else values[step], default=None)

    def _make_manager(self) -> Any:
        ocp = self._ocp
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: 0.0,  # without it, Orbax stores no metrics
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
        """The latest, the best of their phases, and those whose metrics can't be told."""
        latest = steps[-self._keep :]
        unknown = {step for step in steps if self._metrics.get(step) is None}
        return {*latest, *unknown, *(self._best(reversed(steps), phase) for phase in map(self._phase, latest))}

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


def _as_dict(state: TrainState) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in TrainState.__dataclass_fields__}


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
