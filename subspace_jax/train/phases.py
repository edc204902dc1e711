"""What a run consists of: its data, its phases, and how it is carried out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from subspace_jax.train.overrides import form
from subspace_jax.train.sharding import DEFAULT_RULES, Rules
from subspace_jax.train.task import Task

if TYPE_CHECKING:
    import grain

    from subspace_jax.train.state import TrainState

PyTree = Any
Row = Mapping[str, Any]
Optimizer = optax.GradientTransformation | Mapping[str, optax.GradientTransformation]


class DataSpec(NamedTuple):
    """The data of a phase.

    Attributes:
      batch: Shapes and dtypes of a training batch over all processes, by name.  Examples lie along the first axis.
      train: Makes the endless, shuffled, checkpointable iterator from a seed, over this process's examples.  Its state
        is the same on every process, so that a run may resume with another number of them.
      evaluate: Set name to a function that makes one ordered pass over the set; its batches hold a ``mask``, 0 for
        padding.
      steps_per_epoch: Batches in one pass over the training set.
    """

    batch: Mapping[str, jax.ShapeDtypeStruct]
    train: Callable[[int], "grain.DatasetIterator"]
    evaluate: Mapping[str, Callable[[], Iterable[Mapping[str, np.ndarray]]]]
    steps_per_epoch: int


class At(NamedTuple):
    """What the host code between rounds is given beside the state.

    Attributes:
      rows: The rows of the run until now: dicts with ``phase``, ``step`` (of the run), ``split`` ("train", or the name
        of an evaluator), and scalars by name.
      key: Random key of this phase and round.
      evaluate: ``evaluate(name) -> scalars and arrays``: an evaluator's result at the given state.
      host: ``host(fn, *arrays)``: what ``fn`` returns on process 0 for the whole arrays in NumPy, on every process.
    """

    rows: Sequence[Row]
    key: jax.Array
    evaluate: Callable[[str], Mapping[str, Any]]
    host: Callable[..., Any]


class Phase(NamedTuple):
    """A part of a run with its own task, data and optimizer; most runs have one.

    Host code runs only between rounds, in this order: row, evaluation, checkpoint, ``stop``, ``refresh``.

    Attributes:
      name: Its name, unique in the run.
      task: The method.
      data: Its data, or a function of the state that returns them, called after ``enter`` and ``refresh``.  It reads
        only what steps do not change, for a resumed run calls it with the state that it resumes from.
      num_steps: The most steps that it takes; 0 for those that the config of the run says.  Where a config sets
        ``train.steps``, no phase takes more.
      tx: The optimizer; None for that of the config.  A dict ``{entry: transform}`` updates entries of the parameters
        in turn, each gradient at the parameters as they then stand; other entries do not move.
      enter: ``enter(state, at) -> (params, variables, opt_state or None)`` makes the first state from the last one of
        the phase before (in the first phase from that of ``init`` or ``load``, which later ones do not call), with the
        shapes of ``task.init``.  By default parameters and variables are carried over.  Without an ``opt_state`` the
        optimizer starts fresh.
      round_steps: Steps of a round; 0 for one round.
      refresh: ``refresh(state, at) -> state``, called before the first round and between rounds.
      stop: ``stop(rows) -> bool``, called between rounds with the rows of this phase: whether it ends.  It runs on
        process 0.
      best: "max:METRIC" or "min:METRIC" hands the best evaluated state of this phase on to the next one, see
        :attr:`Run.best`.
      learning_rate: The learning rate of ``tx`` as a function of its count, in Python numbers, for rows; a config's
        optimizer has that of the config.
    """

    name: str
    task: Task
    data: "DataSpec | Callable[[TrainState], DataSpec]"
    num_steps: int = 0
    tx: Optimizer | None = None
    enter: "Callable[[TrainState, At], tuple[PyTree, PyTree, PyTree | None]] | None" = None
    round_steps: int = 0
    refresh: "Callable[[TrainState, At], TrainState] | None" = None
    stop: Callable[[Sequence[Row]], bool] | None = None
    best: str | None = None
    learning_rate: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Run:
    """A run: its phases, and how they are carried out.

    A method's ``build(config)`` returns one with the phases and, where it has any, the summary;
    :func:`subspace_jax.train.build` fills in the rest from the config.

    Attributes:
      phases: The phases, in order.
      summary: Makes the scalars of the whole run from its rows, see :class:`At`; it runs on process 0.
      config: The config that describes the run, or None.
      workdir: Folder of the run.
      mesh: The mesh; all devices along ``data`` by default.
      rules: Logical name to mesh axis or axes.
      seed: Seed of parameters, data order and step randomness.
      accumulate: Micro-batches in a batch.
      remat: See :func:`subspace_jax.train.make_train_step`.
      finite_check: Likewise.
      log_every: Steps between two rows of training metrics.
      eval_every: Steps between two evaluations; 0 evaluates at the end of each round only, None after each epoch of
        the phase's data.
      checkpoint_every: The most steps that a kill at any time may cost; 0 saves at the end of each phase only, None
        stands for an epoch of the phase's data.  A checkpoint is begun twice in that many steps, and written in the
        background while steps go on; the next one waits until it is complete.
      keep: How many of the latest checkpoints stay; the best one stays besides.
      best: Metric by which the best checkpoint of a phase is found: ``"max:METRIC"`` or ``"min:METRIC"`` of the
        evaluator "eval", ``"max:NAME/METRIC"`` of another one; empty ranks none.
      patience: Evaluations without a better value of that metric after which a phase ends, its last state saved; 0
        never does.
      profile_at: Step from which five steps are traced for the profiler; 0 traces none, and so does a run that resumes
        from that step or a later one.
      data_timeout: Seconds that the data may let the run wait for a batch; 0 waits for ever.
      max_skipped: Skipped steps in a row (see :func:`subspace_jax.train.make_train_step`) after which the run stops,
        with the last batch saved; looked at every so many steps.  0 never stops.
      progress: Whether to show the run: what it is at the start, a progress bar on a terminal, elsewhere a line every
        half a minute.
      wandb: Project of Weights & Biases that the rows also go to, with ``wandb`` installed; empty for none.
      about: Text about the run that is shown at its start.
      restart: Begin at step 0 where ``workdir`` holds a run, which is kept below it in a folder ``earlier.1`` (or the
        next number that is free).
      change_seed: Resume with another seed than that of the run, in its randomness and in the order of its data from
        there on; without it, another seed is refused.
    """

    phases: tuple[Phase, ...]
    summary: Callable[[Sequence[Row]], Mapping[str, float]] | None = None
    config: Any = None
    workdir: str | Path = ""
    mesh: Mesh | None = None
    rules: Rules = field(default_factory=lambda: DEFAULT_RULES)
    seed: int = 0
    accumulate: int = 1
    remat: str = "none"
    finite_check: str = "state"
    log_every: int = 50
    eval_every: int | None = 0
    checkpoint_every: int | None = 0
    keep: int = 2
    best: str = "min:loss"
    patience: int = 0
    profile_at: int = 0
    data_timeout: float = 0.0
    max_skipped: int = 0
    progress: bool = True
    wandb: str = ""
    about: str = ""
    restart: bool = False
    change_seed: bool = False


def batch_shapes(examples: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of examples, for :attr:`DataSpec.batch`.

    Args:
      examples: Arrays with examples along the first axis: a whole set, or the batch of one process.
      batch_size: Examples in a batch over all processes.
    """
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in examples.items()}


def array_data(
    train_set: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    evaluate: Mapping[str, Mapping[str, np.ndarray]],
    eval_batch_size: int = 0,
) -> DataSpec:
    """Makes the data of a phase from sets that are in memory.

    Args:
      train_set: Arrays with examples along the first axis.
      batch_size: Examples in a batch over all processes.
      evaluate: Name to set, for evaluation.
      eval_batch_size: Examples in a batch of evaluation; that of training by default.

    Raises:
      ValueError: A size can't serve, or a set is no dict of arrays.
    """
    from subspace_jax import data

    num_examples = _num_examples("train_set", train_set)
    for name, rows in _sets(evaluate):
        _num_examples(f"evaluate[{name!r}]", rows)
    data.train_batches(train_set, batch_size=batch_size, seed=0)  # what is wrong with the batch size shows now
    return DataSpec(
        batch=batch_shapes(train_set, batch_size),
        train=lambda seed: data.train_batches(train_set, batch_size=batch_size, seed=seed),
        evaluate={name: data.eval_passes(rows, eval_batch_size or batch_size) for name, rows in evaluate.items()},
        steps_per_epoch=data.steps_per_epoch(num_examples, batch_size),
    )


def whole_set_data(
    examples: Mapping[str, np.ndarray], *, multiple_of: int = 1, evaluate: Mapping[str, Any] | None = None
) -> DataSpec:
    """Makes the data of a phase each of whose batches is the whole set, in order.

    Args:
      examples: Arrays with examples along the first axis.
      multiple_of: The batch is padded with zeros to a multiple of this, which the data axes of the mesh have to divide;
        its ``mask`` is 1 for examples and 0 for padding.
      evaluate: As for :class:`DataSpec`; by default "eval" is the same batch.

    Raises:
      ValueError: ``examples`` is no dict of arrays, ``multiple_of`` is no integer of at least 1, or ``evaluate`` is no
        dict of functions.
    """
    from subspace_jax import data

    num_examples = _num_examples("examples", examples)
    if not isinstance(multiple_of, int | np.integer) or multiple_of < 1:
        raise ValueError(f"multiple_of: expected an integer of at least 1, got {multiple_of!r}")
    for name, make in _sets(evaluate or {}):
        if not callable(make):
            raise ValueError(f"evaluate[{name!r}]: expected a function that makes a pass, got {form(make)}")
    batch_size = -(-num_examples // multiple_of) * multiple_of
    (batch,) = data.eval_batches(examples, batch_size=batch_size)
    passes = {"eval": lambda: [batch]} if evaluate is None else dict(evaluate)
    return DataSpec(batch_shapes(batch, batch_size), lambda seed: _Repeated(batch), passes, 1)


def _num_examples(name: str, examples: Any) -> int:
    """Returns the number of examples; raises a ValueError that names the argument where it is no dict of arrays."""
    if not isinstance(examples, Mapping) or not examples:
        raise ValueError(f"{name}: expected a dict of arrays with examples along the first axis, got {form(examples)}")
    lengths = {key: len(rows) if np.ndim(rows) else None for key, rows in examples.items()}
    first = next(iter(lengths.values()))
    if not first or set(lengths.values()) != {first}:
        raise ValueError(f"{name}: expected the same number of examples, at least one, in each array, got {lengths}")
    return first


def _sets(evaluate: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(evaluate, Mapping):
        raise ValueError(f"evaluate: expected a dict of sets by name, got {form(evaluate)}")
    return evaluate.items()


class _Repeated:
    """Gives the same batch for ever; its position is the number of batches given."""

    def __init__(self, batch: Mapping[str, np.ndarray]):
        self._batch, self._index = batch, 0

    def __iter__(self) -> "_Repeated":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        self._index += 1
        return self._batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._index}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._index = state["next_index"]


def outlined(
    batch: Mapping[str, jax.ShapeDtypeStruct], eval_batch_size: int = 0, *, sets: Sequence[str] = ("eval",)
) -> DataSpec:
    """Makes the data of a run that is planned and not carried out: shapes without examples.

    Args:
      batch: Shapes of a training batch.
      eval_batch_size: Examples in a batch of evaluation; that of training by default.
      sets: Names of the sets for evaluation, whose batches have the same arrays and a mask.
    """
    num_examples = eval_batch_size or next(iter(batch.values())).shape[0]
    shapes = {name: jax.ShapeDtypeStruct((num_examples, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    shapes["mask"] = jax.ShapeDtypeStruct((num_examples,), np.float32)

    def no_examples(seed):
        raise ValueError("data: this run was made for planning, and has no examples")

    return DataSpec(dict(batch), no_examples, {name: lambda: [shapes] for name in sets}, 1)
