"""A run as its config describes it."""

import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from subspace_jax.train.checkpoints import Checkpoints
from subspace_jax.train.config import differing_fields, override, read_config, save_config
from subspace_jax.train.loop import Data, FitResult, check_evaluation, evaluate, fit
from subspace_jax.train.optimizer import make_optimizer
from subspace_jax.train.sharding import check_batch_size, make_mesh
from subspace_jax.train.step import TrainState, complete_state, frozen_names, make_eval_step, state_shardings
from subspace_jax.train.task import Task
from subspace_jax.train.workdir import writable_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """What a config describes.

    Attributes:
      config: The config.
      task: The method.
      data: Its data.
      tx: The optimizer.
      mesh: The mesh.
      num_steps: Length of the run.
    """

    config: ConfigDict
    task: Task
    data: Data
    tx: optax.GradientTransformation
    mesh: Mesh
    num_steps: int


def build(config: ConfigDict) -> Experiment:
    """Makes what a config describes, and so finds what is wrong with it before anything is written.

    ``config.task`` names a module with a function ``build(config) -> (task, data)``; a module of the user's own
    serves as well as those of this library.

    Args:
      config: The config of a run.

    Returns:
      The experiment.

    Raises:
      ValueError: A field has a value that can't serve; the message names it.
      FileNotFoundError: The data set is not there.
    """
    mesh = make_mesh(**config.mesh)
    try:
        module = importlib.import_module(config.task)
    except (ImportError, ValueError) as error:  # a ValueError for an empty name
        raise ValueError(f"task: can't import the module {config.task!r} ({error})") from error
    if not hasattr(module, "build"):
        raise ValueError(f"task: the module {config.task!r} has no function build(config)")
    task, data = module.build(config)
    check_batch_size(data.batch_size, mesh, accumulate=config.train.accumulate)
    num_steps = config.train.steps or round(config.train.epochs * data.steps_per_epoch)
    if num_steps < 1:
        raise ValueError(
            f"train.steps, train.epochs: expected a run of at least 1 step, got {config.train.steps} steps, "
            f"{config.train.epochs} epochs of {data.steps_per_epoch}"
        )
    check_evaluation(task, data, mesh, best=config.train.best)
    return Experiment(config, task, data, make_optimizer(config.optim, num_steps), mesh, num_steps)


def run(
    config: ConfigDict,
    workdir: str | Path,
    *,
    progress: bool = True,
    restart: bool = False,
    change_seed: bool = False,
) -> FitResult:
    """Trains as a config says, going on where an earlier run in ``workdir`` stopped.

    Args:
      config: The config; it is saved as ``config.json`` once the run begins, not where it is refused.  Where it
        differs from the one of the earlier run, the differences are logged as a warning.
      workdir: Folder of the run.
      progress: Whether to show a progress bar.
      restart: Begin at step 0 where there is a run, which is kept; see :func:`subspace_jax.train.fit`.
      change_seed: Go on with another seed than that of the run; see there.

    Returns:
      The final state and the metrics of the last evaluation.

    Raises:
      ValueError: See :func:`build` and :func:`subspace_jax.train.fit`.
      OSError: ``workdir`` can't be written.
    """
    experiment = build(config)
    workdir = writable_folder(workdir)
    saved = workdir / "config.json"
    is_first_process = jax.process_index() == 0
    if is_first_process and saved.is_file() and not restart:
        try:
            if changes := differing_fields(read_config(saved), config):
                log.warning("The config differs from that of the earlier run in %s: %s", workdir, "; ".join(changes))
        except ValueError as error:  # damaged, and written anew
            log.warning("%s", error)
    settings, epoch = config.train, experiment.data.steps_per_epoch
    return fit(
        experiment.task,
        experiment.tx,
        experiment.data,
        num_steps=experiment.num_steps,
        workdir=workdir,
        mesh=experiment.mesh,
        seed=config.seed,
        accumulate=settings.accumulate,
        remat=settings.remat,
        log_every=settings.log_every,
        eval_every=settings.eval_every or epoch,
        checkpoint_every=settings.checkpoint_every or epoch,
        keep=settings.keep,
        best=settings.best,
        profile_at=settings.profile_at,
        # A config of an earlier version has them not.
        data_timeout=settings.get("data_timeout", 0.0),
        max_skipped=settings.get("max_skipped", 0),
        progress=progress,
        restart=restart,
        change_seed=change_seed,
        on_start=lambda _: save_config(config, saved) if is_first_process else None,
    )


def restore(
    workdir: str | Path, *, step: int | Literal["best"] | None = None, settings: Iterable[str] = ()
) -> tuple[Experiment, TrainState]:
    """Reads a checkpoint of a run back, onto the mesh that its config describes; the run may be going on.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint, or "best" by the metric ``train.best`` of the config; the latest by default.
      settings: Changes to the config, as for :func:`subspace_jax.train.override`: another mesh, for example.

    Returns:
      The experiment and the state.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: A setting is unknown or can't serve.
    """
    workdir = Path(workdir).expanduser().absolute()
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"workdir: {workdir} holds no run (there is no config.json)")
    experiment = build(override(read_config(workdir / "config.json"), settings))
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint yet")
    abstract, shardings = state_shardings(experiment.task, experiment.tx, experiment.mesh)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        best=experiment.config.train.best,
        skip=frozen_names(experiment.task),
        read_only=True,
    )
    try:
        if step == "best" and (step := checkpoints.best_step()) is None:
            raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint that was evaluated")
        state = checkpoints.restore(abstract, shardings, step=step)
    finally:
        checkpoints.close()
    if state is None:
        raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint yet")
    return experiment, complete_state(experiment.task, state, shardings)


def evaluate_run(
    workdir: str | Path, *, step: int | Literal["best"] | None = None, settings: Iterable[str] = ()
) -> tuple[int, dict[str, float]]:
    """Evaluates a checkpoint of a run.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint, or "best" by the metric ``train.best`` of the config; the latest by default.
      settings: Changes to the config, as for :func:`subspace_jax.train.override`: another mesh, for example.

    Returns:
      Its step, and the metrics.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: A setting is unknown or can't serve.
    """
    experiment, state = restore(workdir, step=step, settings=settings)
    eval_step = make_eval_step(experiment.task, experiment.tx, experiment.mesh)
    metrics = evaluate(eval_step, state, experiment.data.evaluate(), mesh=experiment.mesh)
    return int(state.step), metrics
