"""A run as its config describes it."""

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from subspace_jax.train.checkpoints import Checkpoints, Record, parse_best
from subspace_jax.train.checks import check_tasks
from subspace_jax.train.config import default_config, differing_fields, override, read_config
from subspace_jax.train.context import REMAT_POLICIES
from subspace_jax.train.evaluators import Evaluations, scalars
from subspace_jax.train.fields import LARGEST_INT, check_run_fields, complete_config, nearest, shown
from subspace_jax.train.host_schedule import host_schedule
from subspace_jax.train.loop import FitResult, fit
from subspace_jax.train.optimizer import make_optimizer
from subspace_jax.train.overrides import form
from subspace_jax.train.phases import DataSpec, Phase, Run
from subspace_jax.train.programs import Programs, check_run
from subspace_jax.train.sharding import make_mesh, shard_bytes
from subspace_jax.train.state import TrainState, complete_state
from subspace_jax.train.step import FINITE_CHECKS
from subspace_jax.train.workdir import writable_folder

log = logging.getLogger(__name__)


def build(config: ConfigDict) -> Run:
    """Makes the run that a config describes, and so finds what is wrong with it before anything is written.

    ``config.task`` names a module with a function ``build(config) -> Run``, which gives the phases; a module of the
    user's own serves as well as those of this library.  It is imported, and so is code: of a config that came from
    somebody else, see :func:`restore`.

    Types and ranges of fields, the optimizer and the length of its warm-up are checked before any data are read.

    Args:
      config: The config of a run; fields that it lacks, as one of an earlier version may, have their defaults.

    Returns:
      The run, with the complete config, its mesh, and the optimizers and numbers of steps of all phases.

    Raises:
      ValueError: A field has a value that can't serve; the message names it.
      FileNotFoundError: The data set is not there.
    """
    module, config = task_module(config)
    mesh = make_mesh(**config.mesh)
    run = module.build(config)
    if not isinstance(run, Run):
        raise ValueError(f"task: expected a Run from build(config) of {module.__name__!r}, got {form(run)}")
    check_tasks(run)
    run = complete_run(run, config)
    run = dataclasses.replace(run, mesh=mesh)
    check_run(run)
    for phase in run.phases:
        check_memory(*Programs(run).states(phase), mesh)
    return run


def complete_run(run: Run, config: ConfigDict) -> Run:
    """Fills in what the config says: numbers of steps, optimizers of phases without, and all fields of the run.

    Args:
      run: From a method's ``build`` or ``outline``.
      config: The config, with the fields of :func:`subspace_jax.train.default_config`.

    Raises:
      ValueError: The run has no step, or the optimizer can't serve.
    """
    settings, made = config.train, {}
    phases = []
    for phase in run.phases:
        num_steps = _num_steps(phase, config)
        tx = phase.tx
        if tx is None:  # one object for phases that share their task, which so share a compiled step
            key = (id(phase.task), num_steps)
            if key not in made:
                made[key] = make_optimizer(config.optim, num_steps, phase.task.roles())
            tx = made[key]
            if phase.enter is None:  # which may hand on an optimizer's state, with its count
                phase = phase._replace(learning_rate=host_schedule(config.optim, num_steps))
        phases.append(phase._replace(num_steps=num_steps, tx=tx))
    return dataclasses.replace(
        run,
        phases=tuple(phases),
        config=config,
        seed=config.seed,
        accumulate=settings.accumulate,
        remat=settings.remat,
        finite_check=settings.finite_check,
        log_every=settings.log_every,
        eval_every=settings.eval_every or None,
        checkpoint_every=settings.checkpoint_every or None,
        keep=settings.keep,
        best=settings.best,
        patience=settings.patience,
        wandb=settings.wandb,
        profile_at=settings.profile_at,
        data_timeout=settings.data_timeout,
        max_skipped=settings.max_skipped,
    )


def _num_steps(phase: Phase, config: ConfigDict) -> int:
    settings = config.train
    if phase.num_steps:
        return min(phase.num_steps, settings.steps or phase.num_steps)
    if not settings.steps and not isinstance(phase.data, DataSpec):
        raise ValueError(f"train.steps: expected a number of steps, as the data of phase {phase.name!r} come later")
    epoch = phase.data.steps_per_epoch if isinstance(phase.data, DataSpec) else 0
    num_steps = settings.steps or round(settings.epochs * epoch)
    if not 1 <= num_steps <= LARGEST_INT:
        raise ValueError(
            f"train.steps, train.epochs: expected a run of at least 1 step and at most {LARGEST_INT}, got "
            f"{settings.steps} steps, {settings.epochs} epochs of {epoch}"
        )
    return num_steps


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
    for field, known in (("remat", sorted(REMAT_POLICIES)), ("finite_check", sorted(FINITE_CHECKS))):
        got = config.train[field]
        if got not in known:
            raise ValueError(f"train.{field}: expected one of {known}, got {shown(got)}{nearest(got, known)}")
    # All but the length of the warm-up, where the data decide on the number of steps.
    make_optimizer(config.optim, config.train.steps or config.optim.warmup_steps + 1)
    return module, config


def is_own_task(name: str) -> bool:
    """Whether a module is of this library, or one of the examples in its repository."""
    if name.startswith("examples."):
        found = importlib.util.find_spec("examples")
        return found is not None and found.origin == str(Path(__file__).parents[2] / "examples" / "__init__.py")
    return name.startswith("subspace_jax.")


def check_memory(abstract: TrainState, shardings: TrainState, mesh: Mesh) -> None:
    """Raises a ValueError where the train state alone is larger than the memory of this host, or of its devices."""
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
      progress: Whether to show the run, see :attr:`subspace_jax.train.Run.progress`.
      restart: Begin at step 0 where there is a run, which is kept; see :func:`subspace_jax.train.fit`.
      change_seed: Go on with another seed than that of the run; see there.

    Returns:
      The final state and the metrics of the last evaluation.

    Raises:
      ValueError: See :func:`build` and :func:`subspace_jax.train.fit`.
      OSError: ``workdir`` can't be written.
    """
    described = build(config)
    workdir = writable_folder(workdir)
    saved = workdir / "config.json"
    if jax.process_index() == 0 and saved.is_file() and not restart:
        try:
            if changes := differing_fields(read_config(saved), described.config):
                log.warning("The config differs from that of the earlier run in %s: %s", workdir, "; ".join(changes))
        except ValueError as error:  # damaged, and written anew
            log.warning("%s", error)
    return fit(
        dataclasses.replace(described, workdir=workdir, progress=progress, restart=restart, change_seed=change_seed)
    )


class Restored(NamedTuple):
    """A checkpoint of a run.

    Attributes:
      run: The run.
      phase: The phase that the checkpoint is of.
      state: Its state.
      rows: The rows of the run until then.
    """

    run: Run
    phase: Phase
    state: TrainState
    rows: tuple[Any, ...]


def restore(
    workdir: str | Path,
    *,
    step: int | Literal["best"] | None = None,
    settings: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> Restored:
    """Reads a checkpoint of a run back, onto the mesh that its config describes; the run may be going on.

    The ``task`` of the folder's ``config.json`` is a module that is imported: those of this library are, others only
    with ``trust_remote_code``.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint, or "best" by the metric ``train.best`` of the config; the latest by default.
      settings: Changes to the config, as for :func:`subspace_jax.train.override`: another mesh, for example.
      trust_remote_code: Whether a task that is not of this library may be imported, which runs its code.

    Returns:
      The run, the phase and its state.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: A setting is unknown or can't serve.
    """
    workdir = Path(workdir).expanduser().absolute()
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"workdir: {workdir} holds no run (there is no config.json)")
    config = override(read_config(workdir / "config.json"), settings)
    check_trusted(config, workdir / "config.json", trust_remote_code)
    run = build(config)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint yet")
    best = [run.best if phase.best is None else phase.best for phase in run.phases]
    checkpoints, programs = Checkpoints(workdir / "checkpoints", best=best, read_only=True), Programs(run)
    try:
        if step == "best" and (step := checkpoints.best_step()) is None:
            raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint that was evaluated")
        found: tuple[TrainState, Record] | None = checkpoints.restore(programs.saved, step=step)
    finally:
        checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"workdir: {workdir} holds no checkpoint yet")
    state, record = found
    phase = run.phases[record.phase]
    state = complete_state(phase.task, state, programs.states(phase)[1], run.rules)
    return Restored(run, phase, state, tuple(record.rows))


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
      Its step, and the scalars of all evaluators of its phase.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: A setting is unknown or can't serve.
    """
    run, phase, state, _ = restore(workdir, step=step, settings=settings, trust_remote_code=trust_remote_code)
    data = phase.data if isinstance(phase.data, DataSpec) else phase.data(state)
    evaluations, metrics = Evaluations(phase.task, run.mesh, run.rules), {}
    for name in evaluations.evaluators:
        metrics |= scalars(name, evaluations.run(name, state, data.evaluate))
    return int(state.step), metrics
