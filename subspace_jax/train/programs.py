"""What a run compiles, and what is checked of it on shapes alone."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax

from subspace_jax.train.checkpoints import Record, parse_best
from subspace_jax.train.evaluators import Evaluations, Evaluator
from subspace_jax.train.fields import nearest
from subspace_jax.train.phases import DataSpec, Phase, Run
from subspace_jax.train.reading import CheckpointMismatchError
from subspace_jax.train.sharding import check_batch_size
from subspace_jax.train.state import TrainState, saved_part, state_shardings
from subspace_jax.train.step import jit_step, make_train_step
from subspace_jax.train.task import Task

PyTree = Any


class Programs:
    """The compiled steps and evaluations of a run; phases of the same task and optimizer share them.

    Args:
      run: The run, with its mesh.
    """

    def __init__(self, run: Run):
        self._run = run
        self._made: dict[tuple, Any] = {}

    def states(self, phase: Phase) -> tuple[TrainState, TrainState]:
        """Returns the abstract state and its shardings."""
        return self._once("states", phase, lambda run: state_shardings(phase.task, phase.tx, run.mesh, run.rules))

    def step(self, phase: Phase) -> Callable:
        """Returns the compiled step."""

        def make(run: Run) -> Callable:
            options = {"accumulate": run.accumulate, "remat": run.remat, "finite_check": run.finite_check}
            step = make_train_step(phase.task, phase.tx, **options)
            return jit_step(step, self.states(phase)[1], run.rules)

        return self._once("step", phase, make)

    def evaluations(self, phase: Phase) -> Evaluations:
        """Returns the evaluators of the task."""
        return self._once(
            "evaluations",
            phase._replace(tx=None),
            lambda run: Evaluations(phase.task, run.mesh, run.rules, data_timeout=run.data_timeout),
        )

    def saved(self, record: Record) -> tuple[TrainState, TrainState]:
        """Returns what a checkpoint with this record holds, as shapes and shardings."""
        phases = self._run.phases
        if record.phase >= len(phases):
            raise CheckpointMismatchError(
                f"the checkpoint is of phase {record.phase + 1} of a run, this one has {len(phases)}"
            )
        phase = phases[record.phase]
        abstract, shardings = self.states(phase)
        return saved_part(phase.task, abstract), saved_part(phase.task, shardings)

    def _once(self, what: str, phase: Phase, make: Callable[[Run], Any]) -> Any:
        key = (what, id(phase.task), id(phase.tx))
        if key not in self._made:
            self._made[key] = make(self._run)
        return self._made[key]


def check_run(run: Run) -> None:
    """Raises a ValueError for what is wrong with a run, before anything is written.

    Args:
      run: The run, with its mesh.
    """
    if not run.phases:
        raise ValueError("phases: expected at least one, got none")
    if run.log_every < 1:
        raise ValueError(f"log_every: expected at least 1 step, got {run.log_every}")
    for name in ("eval_every", "checkpoint_every", "profile_at"):
        if (getattr(run, name) or 0) < 0:
            raise ValueError(f"{name}: expected 0 or a number of steps, got {getattr(run, name)}")
    for name in ("data_timeout", "max_skipped", "patience"):
        if getattr(run, name) < 0:
            raise ValueError(f"{name}: expected at least 0, got {getattr(run, name)}")
    if not isinstance(run.phases, tuple) or not all(isinstance(phase, Phase) for phase in run.phases):
        raise ValueError(f"phases: expected a tuple of Phase, got {type(run.phases).__name__}")
    names = [phase.name for phase in run.phases]
    if len(set(names)) < len(names):
        raise ValueError(f"phases: expected names that differ, got {names}")
    for phase in run.phases:
        _check_phase(phase)
        if not callable(phase.data):
            check_data(phase, phase.data, run)
    _check_best(run)
    if run.patience and not any(run.best if phase.best is None else phase.best for phase in run.phases):
        raise ValueError("patience: expected a metric best, such as 'min:loss', by which evaluations get better")
    if run.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb: expected the package wandb where a project is named; pip install wandb")


def _check_phase(phase: Phase) -> None:
    if phase.num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1 in phase {phase.name!r}, got {phase.num_steps}")
    if phase.tx is None:
        raise ValueError(f"tx: expected an optimizer in phase {phase.name!r}, got none; a config names one")
    for tx in phase.tx.values() if isinstance(phase.tx, Mapping) else (phase.tx,):
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise ValueError(f"tx: expected an Optax transform in phase {phase.name!r}, got {tx!r}")
    _check_names(phase.task)
    if phase.round_steps < 0:
        raise ValueError(f"round_steps: expected at least 0 in phase {phase.name!r}, got {phase.round_steps}")
    if phase.stop is not None and not phase.round_steps:
        raise ValueError(f"stop: it is called between rounds; expected round_steps in phase {phase.name!r}, got 0")


def _check_names(task: Task) -> None:
    """A role of no parameter, and a frozen entry that is no variable, are misspelt."""
    roles = task.roles()
    if not roles and not task.frozen:
        return
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    for path in roles:
        if not any(f"{known}/".startswith(f"{path}/") for known in paths):
            raise ValueError(f"roles: expected paths of parameters, got {path!r}{nearest(path, paths)}")
    if missing := [name for name in task.frozen if name not in variables]:
        raise ValueError(f"frozen: expected entries of the variables {sorted(variables)}, got {missing}")


def check_data(phase: Phase, data: DataSpec, run: Run) -> None:
    """Raises a ValueError where a batch of a phase can't be sharded over the mesh, or a set is missing.

    Args:
      phase: The phase.
      data: Its data.
      run: The run, with its mesh.
    """
    if not isinstance(data, DataSpec):
        raise ValueError(f"data: expected a DataSpec in phase {phase.name!r}, got {type(data).__name__}")
    check_batch_size(num_examples(data.batch), run.mesh, run.rules, run.accumulate)
    for name, evaluator in phase.task.evaluators().items():
        _check_evaluator(name, evaluator)
        for set_name in evaluator.sets:
            if set_name not in data.evaluate:
                raise ValueError(f"data.evaluate: no set {set_name!r} for {name!r}; there are {sorted(data.evaluate)}")
            shapes = evaluation_shapes(data, set_name)
            examples = num_examples(shapes) * jax.process_count()
            check_batch_size(examples, run.mesh, run.rules, name="eval_batch_size")


def _check_evaluator(name: str, evaluator: Any) -> None:
    if not isinstance(evaluator, Evaluator):
        raise ValueError(f"evaluators: expected an Evaluator as {name!r}, got {evaluator!r}")
    for field in ("sets", "metrics"):
        if isinstance(getattr(evaluator, field), str):
            raise ValueError(f"{field}: expected a tuple of names in {name!r}, got {getattr(evaluator, field)!r}")
    if evaluator.reduce not in ("sum", "rows"):
        raise ValueError(f"reduce: expected 'sum' or 'rows' in {name!r}, got {evaluator.reduce!r}")


def num_examples(batch: Any) -> int:
    """Returns the number of examples in a batch."""
    return next(iter(batch.values())).shape[0]


def evaluation_shapes(data: DataSpec, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of this process's first batch of a set; raises ValueError where there is none."""
    batch = next(iter(data.evaluate[name]()), None)
    if batch is None:
        raise ValueError(f"data.evaluate: the evaluation set {name!r} gave no batch")
    return {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in batch.items()}


def collected_shapes(task: Task, evaluator: Evaluator, batch: Any) -> PyTree:
    """Returns the shapes of what an evaluator collects of a batch of these shapes, or of None."""
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    model = jax.eval_shape(evaluator.prepare, params, variables)
    return jax.eval_shape(lambda m, b, k: evaluator.collect(m, b, key=k), model, batch, jax.random.key(0))


def _check_best(run: Run) -> None:
    """A metric by which phases are ranked has to be one that an evaluator gives; that of the run in any phase."""
    known = [_known_metrics(phase) for phase in run.phases]
    for phase, names in zip(run.phases, known, strict=True):
        if phase.best is not None:
            _check_metric(phase.best, names)
    if run.best and None not in known:
        _check_metric(run.best, {name for names in known for name in names})


def _check_metric(best: str, names: set[str] | None) -> None:
    metric = parse_best(best)[1]
    if names is not None and metric not in names:
        raise ValueError(f"best: evaluation gives {sorted(names)}, got {best!r}{nearest(metric, names)}")


def _known_metrics(phase: Phase) -> set[str] | None:
    """The names by which ``best`` may rank, or None where they are not known before the run."""
    if not isinstance(phase.data, DataSpec):
        return None
    names = set()
    for name, evaluator in phase.task.evaluators().items():
        batch = evaluation_shapes(phase.data, evaluator.sets[0]) if evaluator.sets else None
        prefix = "" if name == "eval" else f"{name}/"
        found = evaluator.metrics or evaluator.scalar_names(collected_shapes(phase.task, evaluator, batch))
        names |= {prefix + metric for metric in found}
    return names
