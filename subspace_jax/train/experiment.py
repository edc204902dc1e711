"""A run as its config describes it."""

import importlib.util
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from subspace_jax.train.checkpoints import Checkpoints, parse_best
from subspace_jax.train.config import default_config, differing_fields, override, read_config, save_config
from subspace_jax.train.fields import LARGEST_INT, check_run_fields, complete_config, nearest, shown
from subspace_jax.train.loop import Data, FitResult, check_evaluation, evaluate, fit
from subspace_jax.train.optimizer import make_optimizer
from subspace_jax.train.sharding import check_batch_size, make_mesh, shard_bytes
from subspace_jax.train.step import (
    REMAT_POLICIES,
    TrainState,
    complete_state,
    frozen_names,
    make_eval_step,
    state_shardings,
)
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
    serves as well as those of this library.  It is imported, and so is code: of a config that came from somebody else,
    see :func:`restore`.

    Types and ranges of fields, the optimizer and the length of its warm-up are checked before any data are read.

    Args:
      config: The config of a run; fields that it lacks, as one of an earlier version may, have their defaults.

    Returns:
      The experiment.

    Raises:
      ValueError: A field has a value that can't serve; the message names it.
      FileNotFoundError: The data set is not there.
    """
    module, config = task_module(config)
    mesh = make_mesh(**config.mesh)
    task, data = module.build(config)
    check_batch_size(data.batch_size, mesh, accumulate=config.train.accumulate)
    num_steps = config.train.steps or round(config.train.epochs * data.steps_per_epoch)
    if not 1 <= num_steps <= LARGEST_INT:
        raise ValueError(
            f"train.steps, train.epochs: expected a run of at least 1 step and at most {LARGEST_INT}, got "
            f"{config.train.steps} steps, {config.train.epochs} epochs of {data.steps_per_epoch}"
        )
    tx = make_optimizer(config.optim, num_steps)
    check_evaluation(task, data, mesh, best=config.train.best)
    check_memory(task, tx, mesh)
    return Experiment(config, task, data, tx, mesh, num_steps)


def task_module(config: ConfigDict) -> tuple[ModuleType, ConfigDict]:
    """Imports the module that a config names, and checks the fields that every run has.

    Returns:
      The module, and the config with all fields.

    Raises:
      ValueError: The module can't be imported or has no ``build``, a field is of another type than in the module's
        ``default_config`` (of a task of the user's own: in :func:`subspace_jax.train.default_config`), or out of range.
    """
    name = config.get("task")
    try:
        if not isinstance(name, str) or not name or name.startswith("."):
            raise ValueError("expected the dotted name of a module")
        module = importlib.import_module(name)
    except Exception as error:  # a module of somebody's own may raise anything
        raise ValueError(f"task: can't import the module {shown(name)} ({_one_line(error)})") from error
    if not hasattr(module, "build"):
        raise ValueError(f"task: the module {name!r} has no function build(config)")
    own = is_own_task(name) and hasattr(module, "default_config")
    template = module.default_config() if own else default_config()
    config = complete_config(config, template)
    for group in ("mesh", "model"):  # handed on by name
        known = template.get(group)
        unknown = [] if known is None else [field for field in config[group] if field not in known]
        if unknown:
            raise ValueError(f"{group}.{unknown[0]}: unknown field{nearest(unknown[0], known)}")
    check_run_fields(config)
    parse_best(config.train.best)
    if config.train.remat not in REMAT_POLICIES:
        known, got = sorted(REMAT_POLICIES), config.train.remat
        raise ValueError(f"train.remat: expected one of {known}, got {shown(got)}{nearest(got, known)}")
    # All but the length of the warm-up, where the data decide on the number of steps.
    make_optimizer(config.optim, config.train.steps or config.optim.warmup_steps + 1)
    return module, config


def is_own_task(name: str) -> bool:
    """Whether a module is of this library, or one of the examples in its repository."""
    if name.startswith("examples."):
        found = importlib.util.find_spec("examples")
        return found is not None and found.origin == str(Path(__file__).parents[2] / "examples" / "__init__.py")
    return name.startswith("subspace_jax.")


def check_memory(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> None:
    """Raises a ValueError where the train state alone is larger than the memory of this host, or of its devices."""
    abstract, shardings = state_shardings(task, tx, mesh)
    needed, devices = shard_bytes(abstract, shardings), jax.local_devices()
    if devices[0].platform == "cpu":
        there, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this host"
        needed *= len(mesh.local_devices)
    else:
        there, what = (devices[0].memory_stats() or {}).get("bytes_limit", needed), "a device"
    if needed > there:
        raise ValueError(
            f"model: parameters, variables and optimizer state take {needed / 2**30:.1f} GiB, {what} has "
            f"{there / 2**30:.1f} GiB"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: {text}"


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
    config = experiment.config
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
        data_timeout=settings.data_timeout,
        max_skipped=settings.max_skipped,
        progress=progress,
        restart=restart,
        change_seed=change_seed,
        on_start=lambda _: save_config(config, saved) if is_first_process else None,
    )


def restore(
    workdir: str | Path,
    *,
    step: int | Literal["best"] | None = None,
    settings: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> tuple[Experiment, TrainState]:
    """Reads a checkpoint of a run back, onto the mesh that its config describes; the run may be going on.

    The ``task`` of the folder's ``config.json`` is a module that is imported: those of this library are, others only
    with ``trust_remote_code``.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint, or "best" by the metric ``train.best`` of the config; the latest by default.
      settings: Changes to the config, as for :func:`subspace_jax.train.override`: another mesh, for example.
      trust_remote_code: Whether a task that is not of this library may be imported, which runs its code.

    Returns:
      The experiment and the state.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: A setting is unknown or can't serve.
    """
    workdir = Path(workdir).expanduser().absolute()
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"workdir: {workdir} holds no run (there is no config.json)")
    config = override(read_config(workdir / "config.json"), settings)
    check_trusted(config, workdir / "config.json", trust_remote_code)
    experiment = build(config)
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


def check_trusted(config: ConfigDict, path: Path, trust_remote_code: bool) -> None:
    """Raises a ValueError where a config from a folder names a task that is not of this library."""
    name = config.get("task")
    if not trust_remote_code and not (isinstance(name, str) and is_own_task(name)):
        raise ValueError(
            f"task: {path} names the module {shown(name)}, which is not of subspace_jax, and importing it runs its "
            "code; where you trust it: --trust-remote-code (trust_remote_code=True)"
        )


def evaluate_run(
    workdir: str | Path,
    *,
    step: int | Literal["best"] | None = None,
    settings: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> tuple[int, dict[str, float]]:
    """Evaluates a checkpoint of a run.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint, or "best" by the metric ``train.best`` of the config; the latest by default.
      settings: Changes to the config, as for :func:`subspace_jax.train.override`: another mesh, for example.
      trust_remote_code: See :func:`restore`.

    Returns:
      Its step, and the metrics.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: A setting is unknown or can't serve.
    """
    experiment, state = restore(workdir, step=step, settings=settings, trust_remote_code=trust_remote_code)
    eval_step = make_eval_step(experiment.task, experiment.tx, experiment.mesh)
    metrics = evaluate(eval_step, state, experiment.data.evaluate(), mesh=experiment.mesh)
    return int(state.step), metrics
