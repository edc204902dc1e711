"""The train loop: resume, step, evaluate, log, checkpoint."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm.contrib.logging import logging_redirect_tqdm

from subspace_jax.train.checkpoints import Checkpoints, parse_best
from subspace_jax.train.fields import nearest
from subspace_jax.train.interruptions import FiniteWatch, Notice, Preempted, Timed
from subspace_jax.train.lock import locked
from subspace_jax.train.metrics_log import MetricsLog, plot_curves, progress_bar
from subspace_jax.train.reading import together
from subspace_jax.train.sharding import DEFAULT_RULES, Rules, batch_sharding, check_batch_size, make_mesh, to_device
from subspace_jax.train.step import (
    TrainState,
    complete_state,
    frozen_names,
    init_state,
    make_eval_step,
    make_train_step,
    run_key,
    state_shardings,
)
from subspace_jax.train.task import Batch, Metrics, Task
from subspace_jax.train.workdir import check_never_saved, mark_saved, set_aside, warn_of_lost, writable_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
      batch_size: Rows of a batch, over all processes.
      steps_per_epoch: Batches in one pass over the training set.
      train: Makes the endless, shuffled, checkpointable iterator from a seed.  Its state is the same on every process,
        so that a run may go on with another number of them.
      evaluate: Makes one ordered pass over the evaluation set; its batches hold a ``mask``.
    """

    batch_size: int
    steps_per_epoch: int
    train: Callable[[int], grain.DatasetIterator]
    evaluate: Callable[[], Iterable[Mapping[str, np.ndarray]]]


class FitResult(NamedTuple):
    """What :func:`fit` returns: the final state, and the metrics of the last evaluation."""

    state: TrainState
    metrics: dict[str, float]


def fit(
    task: Task,
    tx: optax.GradientTransformation,
    data: Data,
    *,
    num_steps: int,
    workdir: str | Path,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    seed: int = 0,
    accumulate: int = 1,
    remat: str = "none",
    log_every: int = 50,
    eval_every: int = 0,
    checkpoint_every: int = 0,
    keep: int = 2,
    best: str = "min:loss",
    profile_at: int = 0,
    data_timeout: float = 0.0,
    max_skipped: int = 0,
    progress: bool = True,
    restart: bool = False,
    change_seed: bool = False,
    on_start: Callable[[int], None] | None = None,
) -> FitResult:
    """Trains up to a number of steps, going on from the last checkpoint in ``workdir`` where there is one.

    A run that was killed and is started again ends with the very bits of one that was not.  The loop hands steps to
    the devices without waiting for them; it reads numbers back only when it logs, evaluates or saves.

    A run that gets SIGTERM ends its step, saves and raises :class:`Preempted`; with several processes all of them do so
    after the same step.

    Written below ``workdir``: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``curves.png``,
    ``newest_checkpoint.json``, while it runs ``run.lock``, and, when asked for, ``profile/``.

    Args:
      task: The method.
      tx: The optimizer.
      data: Its data.
      num_steps: Step at which the run ends, counted from its very beginning.
      workdir: Folder of the run.
      mesh: The mesh; all devices along ``data`` by default.
      rules: Logical name to mesh axis or axes.
      seed: Seed of parameters, data order and step randomness.
      accumulate: Micro-batches in a batch.
      remat: See :func:`subspace_jax.train.make_train_step`.
      log_every: Steps between two rows of training metrics.
      eval_every: Steps between two evaluations; 0 evaluates at the end only.
      checkpoint_every: The most steps that a kill at any time may cost; 0 saves at the end only.  A checkpoint is begun
        twice in that many steps, and written in the background while steps go on; the next one waits until it is whole.
        So the newest that is whole never lies further back, however slow the disk is.
      keep: How many of the latest checkpoints stay; the best one stays besides.
      best: Evaluation metric by which the best is found: ``"max:METRIC"`` or ``"min:METRIC"``.
      profile_at: Step from which five steps are traced for the profiler; 0 traces none, and so does a run that goes on
        from that step or a later one.
      data_timeout: Seconds that the data may let the run wait for a batch; 0 waits for ever.
      max_skipped: Skipped steps in a row (see :func:`subspace_jax.train.make_train_step`) after which the run stops,
        with the last batch saved; looked at every so many steps.  0 never stops.
      progress: Whether to show a progress bar.
      restart: Begin at step 0 where ``workdir`` holds a run, which is kept below it in a folder ``earlier.1`` (or the
        next number that is free).
      change_seed: Go on with another seed than that of the run, in its randomness and in the order of its data from
        there on; without it, another seed is refused.
      on_start: Called with the step from which the run goes on, when nothing is left that could refuse it.

    Returns:
      The final state and the metrics of the last evaluation.

    Raises:
      ValueError: A number is out of range, a batch can't be split over the mesh, evaluation has no such metric, or
        ``workdir`` holds a run with another seed.
      CheckpointMismatchError: ``workdir`` holds checkpoints of another model.
      OSError: ``workdir`` can't be read or written, is in use by another run, or has lost its checkpoints, or the disk
        is full.
      TimeoutError: A batch did not come in time.
      NotFiniteError: Too many steps in a row were skipped.
      Preempted: The run got SIGTERM, and its state is saved.
    """
    if num_steps < 1 or log_every < 1:
        raise ValueError(f"num_steps and log_every: expected at least 1, got {num_steps} and {log_every}")
    periods = {"eval_every": eval_every, "checkpoint_every": checkpoint_every, "profile_at": profile_at}
    if min(periods.values()) < 0:
        raise ValueError(f"{', '.join(periods)}: expected 0 or a number of steps, got {periods}")
    if data_timeout < 0 or max_skipped < 0:
        raise ValueError(f"data_timeout, max_skipped: expected at least 0, got {data_timeout} and {max_skipped}")
    mesh = make_mesh() if mesh is None else mesh
    check_batch_size(data.batch_size, mesh, rules, accumulate)
    check_evaluation(task, data, mesh, rules, best=best)
    abstract, shardings = state_shardings(task, tx, mesh, rules)
    train_step = make_train_step(task, tx, mesh, rules, accumulate=accumulate, remat=remat)
    workdir = writable_folder(workdir)
    batches = data.train(seed)
    with locked(workdir), contextlib.ExitStack() as last:
        if restart:
            together(lambda: jax.process_index() or set_aside(workdir), f"move what is in {workdir}")
        checkpoints = Checkpoints(workdir / "checkpoints", keep=keep, best=best, skip=frozen_names(task))
        last.callback(checkpoints.close)
        state = checkpoints.restore(abstract, shardings, data=batches)
        if state is None:
            check_never_saved(workdir)
            state = init_state(task, tx, mesh, rules, seed=seed)
        else:
            state = _with_seed(state, seed, shardings, workdir, change=change_seed)
            state = complete_state(task, state, shardings)
            warn_of_lost(workdir, checkpoints.steps())
            log.info("Going on from step %d of %s.", int(state.step), checkpoints.directory)
        start = int(state.step)
        checkpoints.remove_after(start)
        if on_start is not None:
            on_start(start)
        run = _Run(
            train_step=train_step,
            evaluate=functools.partial(evaluate, make_eval_step(task, tx, mesh, rules), mesh=mesh, rules=rules),
            data=data,
            batches=batches,
            checkpoints=checkpoints,
            workdir=workdir,
            data_timeout=data_timeout,
            max_skipped=max_skipped,
        )
        every = _Every(num_steps, log_every, eval_every, checkpoint_every)
        try:
            result = run.go(state, start, every, profile_at, batch_sharding(mesh, rules), progress)
        except jax.errors.JaxRuntimeError:
            if jax.process_count() > 1:
                # At once: closing below waits for the others, and JAX ends the process when it finds one dead.
                log.error("Process %d lost another one, or failed itself; the run ends.", jax.process_index())
            raise
        last.close()
        run.mark_saved(int(result.state.step))
        if jax.process_index() == 0:
            plot_curves({"run": workdir / "metrics.jsonl"}, workdir / "curves.png")
    return result


def _with_seed(state: TrainState, seed: int, shardings: TrainState, workdir: Path, *, change: bool) -> TrainState:
    """Compares the key of a restored state with that of a seed; raises ValueError for another one."""
    key = run_key(seed)
    if np.array_equal(np.asarray(key), np.asarray(state.key)):
        return state
    if not change:
        raise ValueError(
            f"seed: the run in {workdir} began with another seed than {seed}; give that one, or go on with this one by "
            "--change-seed (change_seed=True), or start anew by --restart (restart=True)"
        )
    log.warning("Going on with another seed than that of the run before: %d.", seed)
    return dataclasses.replace(state, key=jax.device_put(np.asarray(key), shardings.key))


def check_evaluation(task: Task, data: Data, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, best: str) -> None:
    """Finds, on shapes alone, what would stop a run at its first evaluation.

    Args:
      task: The method.
      data: Its data.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
      best: See :func:`fit`.

    Raises:
      ValueError: There is no evaluation batch, it can't be split over the mesh, or evaluation has no such metric.
    """
    batch = next(iter(data.evaluate()), None)
    if batch is None:
        raise ValueError("data.evaluate: the evaluation set gave no batch")
    shapes = {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in batch.items()}
    rows = next(iter(shapes.values())).shape[0] * jax.process_count()
    check_batch_size(rows, mesh, rules, name="eval_batch_size")
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    metrics = jax.eval_shape(task.evaluate, params, variables, shapes).keys() - {"count"}
    if parse_best(best)[1] not in metrics:
        near = nearest(parse_best(best)[1], metrics)
        raise ValueError(f"best: evaluation gives {sorted(metrics)}, got {best!r}{near}")


class _Every(NamedTuple):
    """When something is due."""

    num_steps: int
    log: int
    evaluate: int
    checkpoint: int

    def due(self, period: int, step: int) -> bool:
        return step == self.num_steps or (period > 0 and step % period == 0)

    def due_to_save(self, step: int) -> bool:
        # Also in the middle: a checkpoint is whole at the latest when the next is due, and then the one before it is
        # one interval old.
        return self.due(self.checkpoint, step) or (
            self.checkpoint > 1 and step % self.checkpoint == self.checkpoint // 2
        )


@dataclass(frozen=True)
class _Run:
    """What the loop holds in hand; made for one call of :func:`fit`."""

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Iterable[Mapping[str, np.ndarray]]], dict[str, float]]
    data: Data
    batches: grain.DatasetIterator
    checkpoints: Checkpoints
    workdir: Path
    data_timeout: float
    max_skipped: int

    def go(self, state, start, every, profile_at, rows, progress) -> FitResult:
        final: dict[str, float] = {}
        begun = start  # step of the last checkpoint, which is whole when the next one is begun
        skipped_before = int(state.skipped)
        watch = FiniteWatch(self.max_skipped, skipped_before, self.workdir)
        with (
            Notice().listen() as notice,
            contextlib.closing(Timed(self.batches, self.data_timeout, "training data")) as batches,
            contextlib.closing(MetricsLog(self.workdir, start_step=start)) as metrics_log,
            logging_redirect_tqdm(),
            progress_bar(every.num_steps, start, show=progress) as bar,
            contextlib.ExitStack() as trace,
        ):
            for step in range(start + 1, every.num_steps + 1):
                if step == profile_at:
                    trace.enter_context(jax.profiler.trace(str(self.workdir / "profile")))
                batch = next(batches)
                state, metrics = self.train_step(state, to_device(batch, rows))
                if profile_at and step == min(profile_at + 4, every.num_steps):
                    jax.block_until_ready(state)
                    trace.close()  # nothing happens where no trace was begun
                bar.update()
                watch.look(step, metrics["skipped"], batch)
                if every.due(every.log, step):
                    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                    metrics_log.write(step, "train", values)
                    bar.set_postfix(loss=f"{values['loss']:.4g}")
                    if values["skipped"] > skipped_before:
                        log.warning(
                            "Up to step %d, %d steps were skipped: a result of theirs was not finite.",
                            step,
                            values["skipped"],
                        )
                        skipped_before = values["skipped"]
                if every.due(every.evaluate, step):
                    final = self._evaluation(state)
                    metrics_log.write(step, "eval", final)
                    log.info("Step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in final.items()))
                if every.due_to_save(step):
                    fresh = final if every.due(every.evaluate, step) else None
                    self.checkpoints.save(state, self.batches, fresh)
                    self.mark_saved(begun)
                    begun = step
                    if every.checkpoint == 1:  # there is no middle in which to write it
                        self.checkpoints.wait()
                if notice.came(step) and step < every.num_steps:
                    self.checkpoints.save(state, self.batches)
                    self.checkpoints.wait()
                    self.mark_saved(step)
                    raise Preempted(step, self.workdir)
        return FitResult(state, final or self._evaluation(state))

    def mark_saved(self, step: int) -> None:
        """Notes a checkpoint that is whole; step 0 is none."""
        if step and jax.process_index() == 0:
            mark_saved(self.workdir, step)

    def _evaluation(self, state) -> dict[str, float]:
        batches = Timed(iter(self.data.evaluate()), self.data_timeout, "evaluation data")
        with contextlib.closing(batches):
            return self.evaluate(state, batches)


def evaluate(
    eval_step: Callable[[TrainState, Batch], Metrics],
    state: TrainState,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
) -> dict[str, float]:
    """Averages what :meth:`Task.evaluate` sums, over one pass; the sums stay on the devices until the end.

    Args:
      eval_step: From :func:`subspace_jax.train.make_eval_step`.
      state: The train state.
      batches: One pass over the evaluation set.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      The means by name.

    Raises:
      ValueError: There is no example.
    """
    rows = batch_sharding(mesh, rules)
    total = None
    for batch in batches:
        sums = eval_step(state, to_device(batch, rows))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    total = {name: float(value) for name, value in jax.device_get(total or {}).items()}
    count = total.pop("count", 0.0)
    if not count:
        raise ValueError("evaluate: the evaluation set gave no example")
    return {name: value / count for name, value in total.items()}
