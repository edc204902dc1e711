"""The train loop: phases of rounds of steps, with rows, evaluations and checkpoints between them."""

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from subspace_jax.train.checkpoints import Checkpoints, Record
from subspace_jax.train.checks import check_hooks, check_tasks
from subspace_jax.train.context import jit_on_mesh, use_mesh
from subspace_jax.train.curves import plot_curves
from subspace_jax.train.early_stopping import best_yet, stopped_early
from subspace_jax.train.evaluators import figures, scalars
from subspace_jax.train.hook import Hook, tell
from subspace_jax.train.hooks import own_hooks
from subspace_jax.train.host import noted, on_first_process, run_on_host
from subspace_jax.train.host_schedule import last_rate, skipped_before
from subspace_jax.train.interruptions import Preempted, Preemption, Timed
from subspace_jax.train.lock import locked
from subspace_jax.train.periods import Periods, due
from subspace_jax.train.phases import At, DataSpec, Phase, Row, Run
from subspace_jax.train.placement import placed, without_aliases
from subspace_jax.train.programs import Programs, check_data, check_run
from subspace_jax.train.reading import together
from subspace_jax.train.seeds import with_seed
from subspace_jax.train.sharding import batch_sharding, make_mesh, to_device
from subspace_jax.train.state import TrainState, complete_state, init_optimizer, init_state, saved_part
from subspace_jax.train.workdir import check_never_saved, mark_saved, set_aside, warn_of_lost, writable_folder

log = logging.getLogger(__name__)

PyTree = Any

_IN_FLIGHT = 3  # steps that may wait on the devices
_HOST_KEY = 2**32 - 3  # folded into the key of a run, whose steps are int32


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
      state: The final state.
      metrics: Scalars of the last evaluation: those of "eval" by their names, others as ``NAME/METRIC``.
      rows: The rows of the run, see :class:`subspace_jax.train.At`.
      summary: What ``Run.summary`` makes of them.
    """

    state: TrainState
    metrics: dict[str, float]
    rows: tuple[Row, ...]
    summary: dict[str, float]


def fit(run: Run, hooks: Sequence[Hook] = ()) -> FitResult:
    """Carries out a run, from the last checkpoint in its ``workdir`` where there is one.

    A run that was killed and is started again ends with the same bits as one that was not.  The loop hands steps to
    the devices without waiting for them, up to a few; it reads values back only for rows, evaluations and checkpoints.

    A run that gets SIGTERM ends its step, saves and raises :class:`Preempted`; with several processes all of them do so
    after the same step.

    Written below ``workdir``: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``curves.png``,
    ``newest_checkpoint.json``, while it runs ``run.lock``, where it has a config ``config.json``, and, when asked for,
    ``profile/``.

    Args:
      run: The run.
      hooks: Observers, called after those that log and show the run.

    Returns:
      The final state, the metrics of the last evaluation, and all rows.

    Raises:
      ValueError: A number is out of range, a batch can't be sharded over the mesh, evaluation has no such metric, or
        ``workdir`` holds a run with another seed.
      CheckpointMismatchError: ``workdir`` holds checkpoints of another model.
      OSError: ``workdir`` can't be read or written, is in use by another run, or has lost its checkpoints, or the disk
        is full.
      TimeoutError: A batch did not come in time.
      NotFiniteError: Too many steps in a row were skipped.
      Preempted: The run got SIGTERM, and its state is saved.
    """
    run = dataclasses.replace(run, mesh=make_mesh() if run.mesh is None else run.mesh)
    check_tasks(run)
    check_hooks(hooks)
    check_run(run)
    programs = Programs(run)
    for phase in run.phases:
        programs.step(phase)  # raises where the options can't serve
    run = dataclasses.replace(run, workdir=writable_folder(run.workdir))
    with locked(run.workdir), contextlib.ExitStack() as last:
        if run.restart:
            together(lambda: jax.process_index() or set_aside(run.workdir), f"move what is in {run.workdir}")
        best = [run.best if phase.best is None else phase.best for phase in run.phases]
        checkpoints = Checkpoints(run.workdir / "checkpoints", keep=run.keep, best=best)
        last.callback(checkpoints.close)
        loop = _Loop(run, programs, checkpoints, [*own_hooks(run), *hooks])
        try:
            result = loop.carry_out()
        except jax.errors.JaxRuntimeError:
            if jax.process_count() > 1:
                # At once: closing below waits for the others, and JAX ends the process when it finds one dead.
                log.error("Process %d lost another one, or failed itself; the run ends.", jax.process_index())
            raise
        last.close()
        loop.mark_saved(int(result.state.step))
        if jax.process_index() == 0:
            plot_curves({"run": run.workdir / "metrics.jsonl"}, run.workdir / "curves.png")
    return result


@dataclasses.dataclass
class _Loop:
    """A run in progress."""

    run: Run
    programs: Programs
    checkpoints: Checkpoints
    hooks: Sequence[Hook]
    rows: list[Row] = dataclasses.field(default_factory=list)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last evaluation
    begun: int = 0  # step of the last checkpoint, which is complete when the next one is begun
    data: DataSpec | None = None  # of the phase, and its iterator
    batches: Any = None
    position: Any = None  # of data that are not open yet

    def carry_out(self) -> FitResult:
        index, state = self.resume()
        with contextlib.ExitStack() as last:
            for hook in self.hooks:
                last.callback(tell, [hook], "on_close")
            tell(self.hooks, "on_start", self.run, int(state.step), int(state.skipped))
            preemption = last.enter_context(Preemption().listen())
            last.enter_context(use_mesh(self.run.mesh, self.run.rules))
            while True:
                with noted(f"in phase {self.run.phases[index].name!r}"):
                    state = self.carry_out_phase(index, state, preemption)
                if index + 1 == len(self.run.phases):
                    break
                state, index = self.enter(index + 1, self.handed_on(index, state)), index + 1
            if not self.metrics:  # a run that had ended before
                self.evaluate(index, state, (False, True), log_rows=False)
            summary = {}
            if self.run.summary is not None:
                with noted("in Run.summary"):
                    summary = on_first_process(lambda: figures("summary", self.run.summary(tuple(self.rows))))
                if arrays := sorted(name for name, value in summary.items() if np.ndim(value)):
                    raise ValueError(f"summary: expected scalars, got arrays {arrays}")
                self.add_row(index, int(state.step), "summary", summary)
            result = FitResult(state, self.metrics, tuple(self.rows), summary)
            tell(self.hooks, "on_end", result)
        return result

    def resume(self) -> tuple[int, TrainState]:
        """Returns the phase, and its state from the last checkpoint or before the first step."""
        run = self.run
        restored = self.checkpoints.restore(self.find, take=self.take)
        if restored is None:
            check_never_saved(run.workdir)
            self.data = self.batches = self.position = None
            first = run.phases[0]
            state = init_state(first.task, first.tx, run.mesh, run.rules, seed=run.seed)
            if first.enter is not None:
                with use_mesh(run.mesh, run.rules):
                    state = self.enter(0, state)
            return 0, state
        state, record = restored
        phase = run.phases[record.phase]
        shardings = self.programs.states(phase)[1]
        state = with_seed(state, run, shardings)
        state = complete_state(phase.task, state, shardings, run.rules)
        self.rows = list(record.rows)
        self.begun = int(state.step)
        warn_of_lost(run.workdir, self.checkpoints.steps())
        log.info("Going on from step %d of %s.", self.begun, self.checkpoints.directory)
        self.checkpoints.remove_after(self.begun)
        return record.phase, state

    def find(self, record: Record) -> tuple[TrainState, TrainState]:
        return self.programs.saved(record)

    def take(self, state: TrainState, record: Record) -> None:
        """Opens the data of a restored state at their position; those that depend on the state are opened later."""
        data = self.run.phases[record.phase].data
        self.data, self.batches, self.position = None, None, record.data
        if isinstance(data, DataSpec):
            self.data, self.batches = data, data.train(self.seed(record.phase))
            self.batches.set_state(record.data)

    def seed(self, index: int) -> int:
        return (self.run.seed + index) % 2**32

    def carry_out_phase(self, index: int, state: TrainState, preemption: Preemption) -> TrainState:
        phase = self.run.phases[index]
        self.metrics = {}
        taken = int(state.step) - int(state.phase_start)
        round_steps = phase.round_steps or phase.num_steps
        while taken < phase.num_steps:
            stopped = stopped_early(self.run, phase, self.rows)
            if stopped or (taken and taken % round_steps == 0 and self.stops(phase)):
                if stopped:
                    log.info("%s", stopped)
                if self.begun != int(state.step):
                    self.save(index, state, self.metrics)
                if not self.metrics:  # a run that had ended before
                    self.evaluate(index, state, (False,), log_rows=False)
                self.evaluate(index, state, (True,))
                break
            if taken % round_steps == 0:
                state = self.refresh(index, state, taken // round_steps)
            self.open(index, state, renew=taken % round_steps == 0)
            until = min(phase.num_steps, (taken // round_steps + 1) * round_steps)
            state = self.carry_out_round(index, state, range(taken + 1, until + 1), preemption)
            taken = int(state.step) - int(state.phase_start)
        self.data = self.batches = self.position = None
        return state

    def carry_out_round(self, index: int, state: TrainState, steps: range, preemption: Preemption) -> TrainState:
        """Takes these steps, counted within the phase, or stops early; the last of them ends the round."""
        run, phase, start = self.run, self.run.phases[index], int(state.phase_start)
        every = Periods.of(run, phase, self.data)
        train_step, place = self.programs.step(phase), batch_sharding(run.mesh, run.rules)
        waiting: deque[jax.Array] = deque()
        is_last_phase, stops = index + 1 == len(run.phases), False
        skipped = skipped_before(phase, self.rows)
        with contextlib.closing(Timed(self.batches, run.data_timeout, "training data")) as batches:
            for taken in steps:
                batch = next(batches)
                state, metrics = train_step(state, to_device(batch, place))
                step = start + taken
                waiting.append(metrics["skipped"])
                if len(waiting) > _IN_FLIGHT:
                    jax.block_until_ready(waiting.popleft())
                tell(self.hooks, "on_step", step, metrics, batch)
                ends = taken == phase.num_steps
                ends_round = ends or (phase.round_steps > 0 and taken == steps[-1])
                if ends_round or taken % every.log == 0:
                    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    rate = last_rate(phase, taken, int(values["skipped"]) - skipped)
                    self.add_row(index, step, "train", {**rate, **values})
                fresh = None
                if ends_round or due(every.evaluate, taken):
                    fresh = self.evaluate(index, state, (False, ends))
                    stops = not ends and stopped_early(run, phase, self.rows) is not None
                if ends or stops or every.due_to_save(taken) or (fresh and self.keeps(phase)):
                    self.save(index, state, fresh)
                    if every.checkpoint == 1:  # there is no middle in which to write it
                        self.checkpoints.wait()
                if preemption.requested(step) and not (ends and is_last_phase):
                    self.save(index, state, None)
                    self.checkpoints.wait()
                    self.mark_saved(step)
                    raise Preempted(step, run.workdir)
                if stops:
                    break
        return state

    def keeps(self, phase: Phase) -> bool:
        """Whether a state that was just evaluated may be asked for later, whatever steps are due to be saved."""
        best = best_yet(self.run, phase, self.rows)  # of a run that may stop early, the best state is kept
        return bool(phase.best) or (best is not None and best.patience == 0)

    def save(self, index: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        task = self.run.phases[index].task
        self.checkpoints.save(saved_part(task, state), Record(index, self.rows, self.batches.get_state()), metrics)
        self.mark_saved(self.begun)
        self.begun = int(state.step)

    def mark_saved(self, step: int) -> None:
        """Notes a checkpoint that is complete; step 0 is none."""
        if step and jax.process_index() == 0:
            mark_saved(self.run.workdir, step)

    def add_row(self, index: int, step: int, split: str, values: Mapping[str, float]) -> None:
        row = {"phase": self.run.phases[index].name, "step": step, "split": split, **values}
        self.rows.append(row)
        tell(self.hooks, "on_row", row)

    def evaluate(
        self, index: int, state: TrainState, last: tuple[bool, ...], *, log_rows: bool = True
    ) -> dict[str, float]:
        """Runs the evaluators whose ``last`` is one of these, and returns their scalars."""
        phase = self.run.phases[index]
        evaluations = self.programs.evaluations(phase)
        data = self.data or self.data_of(index, state)
        found = {}
        for name, evaluator in evaluations.evaluators.items():
            if evaluator.last in last:
                tell(self.hooks, "on_evaluate", name, int(state.step))
                values = scalars(name, evaluations.run(name, state, data.evaluate))
                found |= values
                if log_rows:
                    bare = {key.removeprefix(f"{name}/"): value for key, value in values.items()}
                    self.add_row(index, int(state.step), name, bare)
        self.metrics = {**self.metrics, **found}
        return found

    def stops(self, phase: Phase) -> bool:
        if phase.stop is None:
            return False
        rows = [row for row in self.rows if row["phase"] == phase.name]
        with noted("in stop"):
            return on_first_process(lambda: bool(phase.stop(rows)))

    def open(self, index: int, state: TrainState, *, renew: bool) -> None:
        """Opens the data of a phase, and those that are a function of the state anew at the start of a round."""
        if self.batches is not None:
            if isinstance(self.run.phases[index].data, DataSpec) or not renew:
                return
            self.position = self.batches.get_state()
        self.data = self.data_of(index, state)
        self.batches = self.data.train(self.seed(index))
        if self.position is not None:
            self.batches.set_state(self.position)

    def data_of(self, index: int, state: TrainState) -> DataSpec:
        phase = self.run.phases[index]
        if isinstance(phase.data, DataSpec):
            return phase.data
        with noted("in data"):
            data = phase.data(state)
        check_data(phase, data, self.run)
        return data

    def at(self, index: int, state: TrainState, *folded: int) -> At:
        """What host code of a phase is given, at a state of it."""
        phase = self.run.phases[index]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), _HOST_KEY)
        for number in folded:
            key = jax.random.fold_in(key, number)

        def evaluate(name: str) -> Mapping[str, Any]:
            data = self.data or self.data_of(index, state)
            return self.programs.evaluations(phase).run(name, state, data.evaluate)

        return At(tuple(self.rows), key, evaluate, run_on_host)

    def refresh(self, index: int, state: TrainState, number: int) -> TrainState:
        phase = self.run.phases[index]
        if phase.refresh is None:
            return state
        with noted("in refresh"):
            new = phase.refresh(state, self.at(index, state, index, number))
        if not isinstance(new, TrainState):
            raise ValueError(f"phase {phase.name!r}: refresh: expected a TrainState, got {type(new).__name__}")
        abstract, shardings = self.programs.states(phase)
        where = f"phase {phase.name!r}: refresh: "
        parts = {
            name: placed(where + name, *(getattr(x, name) for x in (new, abstract, shardings)))
            for name in ("params", "variables", "opt_state")
        }
        return dataclasses.replace(state, **without_aliases(parts))

    def handed_on(self, index: int, state: TrainState) -> TrainState:
        """The state that the next phase enters from."""
        phase = self.run.phases[index]
        self.checkpoints.wait()
        step = self.checkpoints.best_step() if phase.best is not None else None
        if step is None or step == int(state.step):
            return state
        best, _ = self.checkpoints.restore(self.find, step=step)
        best = complete_state(phase.task, best, self.programs.states(phase)[1], self.run.rules)
        return dataclasses.replace(best, step=state.step, skipped=state.skipped, key=state.key)

    def enter(self, index: int, state: TrainState) -> TrainState:
        """Makes the first state of a phase from the last of the one before."""
        phase = self.run.phases[index]
        abstract, shardings = self.programs.states(phase)
        params, variables, opt_state = state.params, state.variables, None
        if phase.enter is not None:
            with noted(f"in enter of phase {phase.name!r}"):
                entered = phase.enter(state, self.at(max(index - 1, 0), state, index, 2**32 - 1))
            if not isinstance(entered, tuple) or len(entered) != 3:
                what = f"{len(entered)} values" if isinstance(entered, tuple) else type(entered).__name__
                raise ValueError(
                    f"phase {phase.name!r}: enter: expected (params, variables, opt_state or None), got {what}"
                )
            params, variables, opt_state = entered
        where = f"phase {phase.name!r}: enter: "
        params = placed(f"{where}params", params, abstract.params, shardings.params)
        variables = placed(f"{where}variables", variables, abstract.variables, shardings.variables)
        if opt_state is None:
            opt_state = jit_on_mesh(
                lambda params: init_optimizer(phase.tx, params),
                self.run.mesh,
                shardings.opt_state,
                rules=self.run.rules,
            )(params)
        else:
            opt_state = placed(f"{where}opt_state", opt_state, abstract.opt_state, shardings.opt_state)
        parts = {"params": params, "variables": variables, "opt_state": opt_state}
        self.data = self.batches = self.position = None
        return dataclasses.replace(state, phase_start=jax.numpy.copy(state.step), **without_aliases(parts))
