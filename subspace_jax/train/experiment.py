"""A run as its config describes it."""

import importlib
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from subspace_jax.train.checkpoints import Checkpoints
from subspace_jax.train.config import read_config, save_config
from subspace_jax.train.loop import Data, FitResult, evaluate, fit, writable_folder
from subspace_jax.train.optimizer import make_optimizer
from subspace_jax.train.sharding import check_batch_size, make_mesh
from subspace_jax.train.step import TrainState, make_eval_step, state_shardings
from subspace_jax.train.task import Task


def build(config: ConfigDict) -> tuple[Task, Data, optax.GradientTransformation, Mesh, int]:
    """Makes what a config describes, and so finds what is wrong with it before anything is written.

    ``config.task`` names a module with a function ``build(config) -> (task, data)``; a module of the user's own
    serves as well as those of this library.

    Args:
      config: The config of a run.

    Returns:
      ``(task, data, optimizer, mesh, number of steps)``.

    Raises:
      ValueError: A field has a value that can't serve; the message names it.
      FileNotFoundError: The data set is not there.
    """
    mesh = make_mesh(**config.mesh)
    try:
        module = importlib.import_module(config.task)
    except ImportError as error:
        raise ValueError(f"task: can't import the module {config.task!r} ({error})") from error
    task, data = module.build(config)
    check_batch_size(data.batch_size, mesh, accumulate=config.train.accumulate)
    num_steps = config.train.steps or round(config.train.epochs * data.steps_per_epoch)
    return task, data, make_optimizer(config.optim, num_steps), mesh, num_steps


def run(config: ConfigDict, workdir: str | Path, *, progress: bool = True) -> FitResult:
    """Trains as a config says, going on where an earlier run in ``workdir`` stopped.

    Args:
      config: The config; it is saved as ``config.json``.
      workdir: Folder of the run.
      progress: Whether to show a progress bar.

    Returns:
      The final state and the metrics of the last evaluation.

    Raises:
      ValueError: See :func:`build` and :func:`subspace_jax.train.fit`.
      OSError: ``workdir`` can't be written.
    """
    task, data, tx, mesh, num_steps = build(config)
    workdir = writable_folder(workdir)
    if jax.process_index() == 0:
        save_config(config, workdir / "config.json")
    settings = config.train
    return fit(
        task,
        tx,
        data,
        num_steps=num_steps,
        workdir=workdir,
        mesh=mesh,
        seed=config.seed,
        accumulate=settings.accumulate,
        remat=settings.remat,
        log_every=settings.log_every,
        eval_every=settings.eval_every or data.steps_per_epoch,
        checkpoint_every=settings.checkpoint_every or data.steps_per_epoch,
        keep=settings.keep,
        profile_at=settings.profile_at,
        progress=progress,
    )


def restore(workdir: str | Path, *, step: int | None = None) -> tuple[ConfigDict, Task, Data, TrainState, Mesh]:
    """Reads a checkpoint of a run back, on the mesh of this process.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint; the latest by default.

    Returns:
      ``(config, task, data, state, mesh)``.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
    """
    workdir = Path(workdir).expanduser().absolute()
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"workdir: {workdir} holds no run (there is no config.json)")
    config = read_config(workdir / "config.json")
    task, data, tx, mesh, _ = build(config)
    abstract, shardings = state_shardings(task, tx, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        state = checkpoints.restore(abstract, shardings, step=step)
    finally:
        checkpoints.close()
    if state is None:
        raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint yet")
    return config, task, data, state, mesh


def evaluate_run(workdir: str | Path, *, step: int | None = None) -> tuple[int, dict[str, float]]:
    """Evaluates a checkpoint of a run.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint; the latest by default.

    Returns:
      Its step, and the metrics.
    """
    config, task, data, state, mesh = restore(workdir, step=step)
    _, _, tx, _, _ = build(config)
    metrics = evaluate(make_eval_step(task, tx, mesh), state, data.evaluate(), mesh=mesh)
    return int(state.step), metrics
