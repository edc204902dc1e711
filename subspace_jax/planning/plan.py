"""Plans of a run: its programs compiled for a topology without the devices, and their cost."""

import dataclasses
import functools
import math
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from subspace_jax.planning.chips import Chip, find_topology, tpu_devices
from subspace_jax.planning.cost import module_cost
from subspace_jax.planning.flops import MatmulFlops, count_matmul_flops
from subspace_jax.planning.meshes import mesh_sizes
from subspace_jax.planning.record import Plan
from subspace_jax.planning.roofline import roofline
from subspace_jax.train.evaluators import Evaluations
from subspace_jax.train.experiment import complete_run, task_module
from subspace_jax.train.phases import DataSpec, Optimizer, Phase, Run
from subspace_jax.train.programs import evaluation_shapes, num_examples
from subspace_jax.train.progress import amount_of
from subspace_jax.train.sharding import batch_sharding, check_batch_size, make_mesh, shard_bytes
from subspace_jax.train.state import TrainState, state_shardings
from subspace_jax.train.step import jit_train_step
from subspace_jax.train.task import Task

PyTree = Any
Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Program(NamedTuple):
    """A program of a run: its name, and a function that compiles and counts it."""

    name: str
    plan: Callable[[], Plan]


def plan_run(
    config: ConfigDict, topology: str, mesh: Mapping[str, int] | None = None, *, evaluations: bool = True
) -> list[Plan]:
    """Plans every distinct train step and evaluation of the run that a config describes.

    For TPUs the programs are compiled for the slice, on any Linux host with ``libtpu``; nothing runs and no array is
    allocated.  For GPUs they are traced and lowered but not compiled: state and FLOPs are known then, temporaries and
    collectives are not.

    The module ``config.task`` may have a function ``outline(config) -> Run`` that reads no data; otherwise its
    ``build`` is called.

    Args:
      config: The config of a run.
      topology: The slice, such as ``v5e:4x4`` or ``h100:8``.
      mesh: Axis to size; missing axes are 1, and ``data`` takes the remaining chips.  That of the config by default.
      evaluations: Whether to plan evaluations too.

    Returns:
      The plans: steps in the order of phases, then evaluations.

    Raises:
      ValueError: The topology is unknown, mesh or batch do not match it, libtpu is not installed, or the data of a
        phase depend on its state.
    """
    return [program.plan() for program in plan_programs(config, topology, mesh, evaluations=evaluations)]


def plan_programs(
    config: ConfigDict, topology: str, mesh: Mapping[str, int] | None = None, *, evaluations: bool = True
) -> list[Program]:
    """Returns the programs of :func:`plan_run`, checked and not yet compiled; see there for arguments and errors."""
    chip, count = find_topology(topology)
    module, config = task_module(config)
    sizes = mesh_sizes(config.mesh if mesh is None else mesh, topology, count)
    if chip.platform == "tpu":
        placed = make_mesh(**sizes, devices=tpu_devices(topology))
    else:
        placed = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    config.mesh.update({"sequence": 1, **sizes})
    run = _with_optimizers(getattr(module, "outline", module.build)(config), config)
    return _steps(run, placed, topology) + (_evaluations(run, placed, topology) if evaluations else [])


def _with_optimizers(run: Run, config: ConfigDict) -> Run:
    """Completes phases by the config; schedules change no shape, and have to be longer than the warm-up only."""
    num_steps = config.train.steps or config.optim.warmup_steps + 1000
    for phase in run.phases:
        if not isinstance(phase.data, DataSpec):
            raise ValueError(f"phases: the data of phase {phase.name!r} depend on its state, and can't be planned")
    phases = tuple(phase._replace(num_steps=phase.num_steps or num_steps) for phase in run.phases)
    return complete_run(dataclasses.replace(run, phases=phases), config)


def _steps(run: Run, mesh: Mesh | AbstractMesh, topology: str) -> list[Program]:
    programs, seen = [], set()
    for phase in run.phases:
        batch = phase.data.batch
        key = (id(phase.task), id(phase.tx), _signature(batch))
        if key not in seen:
            seen.add(key)
            check_batch_size(num_examples(batch), mesh, accumulate=run.accumulate)
            name = "step" if len(run.phases) == 1 else f"step of {phase.name}"
            programs.append(Program(name, functools.partial(_plan_phase, run, phase, name, mesh, topology)))
    return programs


def _plan_phase(run: Run, phase: Phase, name: str, mesh: Mesh | AbstractMesh, topology: str) -> Plan:
    options = {"accumulate": run.accumulate, "remat": run.remat, "finite_check": run.finite_check}
    plan = plan_step(phase.task, phase.tx, phase.data.batch, mesh, topology, **options)
    return dataclasses.replace(plan, program=name)


def _evaluations(run: Run, mesh: Mesh | AbstractMesh, topology: str) -> list[Program]:
    programs, seen = [], set()
    for phase in run.phases:
        for name, evaluator in phase.task.evaluators().items():
            for batch in [evaluation_shapes(phase.data, s) for s in evaluator.sets] or [None]:
                key = (id(phase.task), name, _signature(batch or {}))
                if key not in seen:
                    seen.add(key)
                    if batch is not None:
                        check_batch_size(num_examples(batch), mesh, name="eval_batch_size")
                    plan = functools.partial(plan_evaluation, phase.task, phase.tx, name, batch, mesh, topology)
                    programs.append(Program(f"evaluation {name}", plan))
    return programs


def _signature(batch: Shapes) -> tuple:
    return tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))


def plan_step(
    task: Task,
    tx: Optimizer,
    batch: Shapes,
    mesh: Mesh | AbstractMesh,
    topology: str,
    **options: int | str,
) -> Plan:
    """Plans the train step of a task, see :func:`plan_run`.

    Args:
      task: The task.
      tx: The optimizer.
      batch: Shapes of a batch over all processes.
      mesh: The mesh of :func:`subspace_jax.planning.tpu_devices` or of real devices, or an abstract one.
      topology: The topology of the mesh.
      **options: Options of :func:`subspace_jax.train.make_train_step`.

    Returns:
      The plan.
    """
    abstract, shardings = state_shardings(task, tx, mesh)
    plan = _unplanned("step", topology, mesh, (abstract, shardings), batch)
    step = jit_train_step(task, tx, mesh, **options)
    # The optimizer reads and writes its state and the parameters once.
    optimizer_bytes = 2 * (plan.params + plan.optimizer)
    return _planned(plan, step.trace(abstract, dict(batch)), mesh, uncounted_bytes=optimizer_bytes)


def plan_evaluation(
    task: Task, tx: Optimizer, name: str, batch: Shapes | None, mesh: Mesh | AbstractMesh, topology: str
) -> Plan:
    """Plans ``collect`` of an evaluator, see :func:`plan_run`; the train state stays in memory beside it.

    Args:
      task: The task.
      tx: The optimizer.
      name: Name of the evaluator.
      batch: Shapes of a batch over all processes, None for an evaluator without sets.
      mesh: See :func:`plan_step`.
      topology: Likewise.

    Returns:
      The plan.
    """
    abstract, shardings = state_shardings(task, tx, mesh)
    placed = jax.tree.map(_placed, abstract, shardings)
    prepare, collect = Evaluations(task, mesh).programs(name)
    model, made = _prepared(prepare, placed, isinstance(mesh, AbstractMesh))
    plan = _unplanned(f"evaluation {name}", topology, mesh, (abstract, shardings), batch or {})
    plan = dataclasses.replace(plan, model=made)
    rows = None if batch is None else {key: _placed(x, batch_sharding(mesh)) for key, x in batch.items()}
    index = jax.ShapeDtypeStruct((), jnp.int32)
    traced = collect.trace(model, rows, placed.key, placed.step, index)
    return _planned(plan, traced, mesh, resident=plan.optimizer)


def _placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _prepared(prepare: Callable, state: TrainState, abstract: bool) -> tuple[PyTree, int]:
    """Returns the shapes of what an evaluator prepares, and the bytes that are no arrays of the state."""
    traced = prepare.trace(state.params, state.variables)
    jaxpr = traced.jaxpr.jaxpr
    given = dict(zip(jaxpr.invars, jax.tree.leaves((state.params, state.variables)), strict=True))
    leaves, structure = jax.tree.flatten(traced.out_info)
    made = [i for i, var in enumerate(jaxpr.outvars) if var not in given]
    shardings = jax.tree.leaves(traced.lower().compile().output_shardings) if made and not abstract else []
    for i, var in enumerate(jaxpr.outvars):
        if var in given:
            leaves[i] = given[var]
        elif shardings:
            leaves[i] = _placed(leaves[i], shardings[i])
    return structure.unflatten(leaves), sum(_shard_bytes(leaves[i]) for i in made)


def _shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * jnp.dtype(x.dtype).itemsize


def _unplanned(
    program: str, topology: str, mesh: Mesh | AbstractMesh, state: tuple[TrainState, TrainState], batch: Shapes
) -> Plan:
    abstract, shardings = state
    params = shard_bytes(abstract.params, shardings.params)
    optimizer = shard_bytes(abstract.opt_state, shardings.opt_state)
    rows = batch_sharding(mesh)
    amount, unit = amount_of(batch) if batch else (0, "examples")
    return Plan(
        program=program,
        topology=topology,
        mesh=dict(mesh.shape),
        examples=num_examples(batch) if batch else 0,
        params=params,
        optimizer=optimizer,
        variables=shard_bytes(abstract, shardings) - params - optimizer,
        batch=shard_bytes(dict(batch), dict.fromkeys(batch, rows)),
        limit=find_topology(topology)[0].memory,
        needed_flops=0,
        amount=amount,
        unit=unit,
    )


def _planned(
    plan: Plan, traced: Any, mesh: Mesh | AbstractMesh, *, resident: int = 0, uncounted_bytes: int = 0
) -> Plan:
    """Compiles a traced program, or lowers it for GPUs, and adds its cost.

    Args:
      plan: The plan so far.
      traced: The traced program.
      mesh: The mesh.
      resident: Bytes of ``plan.arguments`` that the program does not take, but that stay in memory.
      uncounted_bytes: Memory traffic of a program that is not compiled, beside its matmuls.
    """
    chip, _ = find_topology(plan.topology)
    counted = count_matmul_flops(traced.jaxpr)
    plan = dataclasses.replace(plan, needed_flops=counted.flops // plan.chips)
    if isinstance(mesh, AbstractMesh):
        traced.lower(lowering_platforms=(chip.platform,))  # fails for what this platform does not support
        return _uncompiled(chip, plan, counted, uncounted_bytes)
    began = time.monotonic()
    lowered = traced.lower()
    try:
        compiled, text = _compile(lowered, chip.platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        plan = _refused(plan, str(error), resident)
    else:
        plan = _compiled(chip, plan, compiled, text, resident)
    return dataclasses.replace(plan, compile_seconds=time.monotonic() - began)


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """Compiles, and returns the program and its text as the compiler writes it.

    ``as_text`` has jaxlib parse the output of libtpu, which fails if jaxlib is older than libtpu.
    """
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The compilation cache can store this program, but not load it without the devices.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(Path(folder).glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
        # A program from the compilation cache leaves no dump.
        return compiled, texts[-1].read_text() if texts else compiled.as_text()


def _compiled(chip: Chip, plan: Plan, compiled: Any, text: str, resident: int) -> Plan:
    memory = compiled.memory_analysis()
    cost = module_cost(text, plan.mesh)
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes + max(beside, 0)
    return dataclasses.replace(
        plan,
        padding=memory.argument_size_in_bytes + resident - plan.arguments,
        temporaries=memory.temp_size_in_bytes,
        code=code,
        total=memory.argument_size_in_bytes + resident + memory.temp_size_in_bytes + code,
        flops=cost.flops,
        memory_bytes=cost.memory_bytes,
        collectives=cost.collectives,
        largest=cost.temporaries,
        open_loops=cost.open_loops,
        time=roofline(chip, cost.flops, cost.memory_bytes, cost.collectives),
    )


def _refused(plan: Plan, message: str, resident: int) -> Plan:
    reason = message.split("\n")[0].partition(": ")[2] or message
    needed = re.search(r"(?:required[^(]*\(|[Uu]sed )([\d.]+)([KMGT])", message)
    total = int(float(needed[1]) * 2 ** (10 * ("KMGT".index(needed[2]) + 1))) + resident if needed else 0
    return dataclasses.replace(plan, total=max(total, plan.arguments), refusal=reason)


def _uncompiled(chip: Chip, plan: Plan, counted: MatmulFlops, uncounted_bytes: int) -> Plan:
    memory_bytes = counted.nbytes // plan.chips + uncounted_bytes
    return dataclasses.replace(
        plan,
        total=plan.arguments,
        flops=plan.needed_flops,
        memory_bytes=memory_bytes,
        time=roofline(chip, plan.needed_flops, memory_bytes, None),
    )
