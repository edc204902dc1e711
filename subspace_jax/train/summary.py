"""What a run is, as the block of text at its start."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from subspace_jax.train.phases import DataSpec, Phase, Run
from subspace_jax.train.progress import amount_of


def run_summary(run: Run, step: int = 0) -> str:
    """Returns what a run is: task, parameters, data, steps, optimizer, devices, and where its files go.

    Args:
      run: The run, with its mesh and with the numbers of steps of its phases.
      step: The step from which it goes on.
    """
    rows = [] if run.config is None else [("task", _task(run.config))]
    for phase in run.phases:
        name = "" if len(run.phases) == 1 else phase.name
        rows += [(f"phase {name}" if name else "parameters", _parameters(phase))]
        rows += [(" data" if name else "data", text) for text in _data(phase)]
        rows += [(" steps" if name else "steps", _steps(phase, run.accumulate))]
    if run.config is not None and all(phase.learning_rate is not None for phase in run.phases):
        rows.append(("optimizer", _optimizer(run)))
    if run.patience:
        rows.append(("early stop", f"after {run.patience} evaluations without a better {run.best.partition(':')[2]}"))
    rows.append(("devices", _devices(run)))
    rows.append(("output", str(run.workdir) if str(run.workdir) else "(no workdir)"))
    if step:
        rows.append(("resumes", f"from step {step:,}"))
    lines = [f"  {name:<11} {text}" for name, text in rows]
    return "\n".join(["Run", *lines, *([run.about] if run.about else [])])


def _task(config: Any) -> str:
    adapter = config.get("adapter") or {}
    method = f", adapter {adapter['method']}" if adapter.get("method") else ""
    return config.task.removeprefix("subspace_jax.").removesuffix(".task") + method


def _parameters(phase: Phase) -> str:
    params, variables = jax.eval_shape(phase.task.init, jax.random.key(0))
    trained = _count(params)
    total = trained + sum(_count(variables[name]) for name in phase.task.frozen if name in variables)
    share = f" ({100 * trained / total:.2g} %)" if trained < total else ""
    return f"{trained:,} trainable of {total:,}{share}"


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _data(phase: Phase) -> list[str]:
    if not isinstance(phase.data, DataSpec):
        return ["made from the state"]
    data = phase.data
    examples = next(iter(data.batch.values())).shape[0]
    (amount, unit), epoch = amount_of(data.batch), data.steps_per_epoch
    # A row holds several texts where they are packed, and padding.
    kind = f"rows of {amount // examples:,} tokens" if unit == "tokens" else unit
    return [f"{epoch * examples:,} {kind} an epoch: {epoch:,} batches of {examples:,}"]


def _steps(phase: Phase, accumulate: int) -> str:
    epochs = ""
    if isinstance(phase.data, DataSpec):
        epochs = f", {phase.num_steps / phase.data.steps_per_epoch:.4g} epochs"
    parts = f", {accumulate} micro-batches each" if accumulate > 1 else ""
    return f"{phase.num_steps:,}{epochs}{parts}"


def _optimizer(run: Run) -> str:
    fields = run.config.optim
    text = f"{fields.name}, learning rate {fields.learning_rate:.4g}, schedule {fields.schedule}"
    if fields.warmup_steps:
        text += f", {fields.warmup_steps:,} steps of warm-up"
    if any("grassmann" in phase.task.roles().values() for phase in run.phases):
        text += f"; {fields.manifold.name} on manifolds"
    return text


def _devices(run: Run) -> str:
    devices = run.mesh.devices.flat
    mesh: Mapping[str, int] = dict(run.mesh.shape)
    shape = ", ".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "data=1"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{run.mesh.size} x {devices[0].device_kind}{processes}, mesh {shape}"
