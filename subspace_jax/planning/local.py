"""Memory of a run's train steps on the devices of this machine, compiled and not run."""

import math
import os

import jax

from subspace_jax.planning.record import Plan
from subspace_jax.train.phases import DataSpec, Phase, Run
from subspace_jax.train.programs import Programs, num_examples
from subspace_jax.train.sharding import batch_sharding, shard_bytes


def plan_here(run: Run) -> list[Plan]:
    """Compiles every distinct train step of a run for its own mesh; nothing runs and no array is allocated.

    Args:
      run: The run of :func:`subspace_jax.train.build`.

    Returns:
      Plans with memory alone, without work and time; none for a phase whose data depend on its state.
    """
    programs, plans = Programs(run), {}
    for phase in run.phases:
        key = (id(phase.task), id(phase.tx))
        if isinstance(phase.data, DataSpec) and key not in plans:
            plans[key] = _plan(run, phase, programs)
    return list(plans.values())


def _plan(run: Run, phase: Phase, programs: Programs) -> Plan:
    abstract, shardings = programs.states(phase)
    batch = dict(phase.data.batch)
    memory = programs.step(phase).trace(abstract, batch).lower().compile().memory_analysis()
    params = shard_bytes(abstract.params, shardings.params)
    optimizer = shard_bytes(abstract.opt_state, shardings.opt_state)
    state = shard_bytes(abstract, shardings)
    rows = shard_bytes(batch, dict.fromkeys(batch, batch_sharding(run.mesh, run.rules)))
    beside = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    code = memory.generated_code_size_in_bytes + beside
    return Plan(
        program="step" if len(run.phases) == 1 else f"step of {phase.name}",
        topology=f"{run.mesh.size} x {_device(run).device_kind}",
        mesh=dict(run.mesh.shape),
        examples=num_examples(batch),
        params=params,
        optimizer=optimizer,
        variables=state - params - optimizer,
        batch=rows,
        limit=_memory(run),
        needed_flops=0,
        padding=memory.argument_size_in_bytes - state - rows,
        temporaries=memory.temp_size_in_bytes,
        code=code,
        total=memory.argument_size_in_bytes + memory.temp_size_in_bytes + code,
        collectives=(),
    )


def _device(run: Run) -> jax.Device:
    return run.mesh.devices.flat[0]


def _memory(run: Run) -> int:
    """Bytes of a device, or of a CPU device's share of this host."""
    limit = None if _device(run).platform == "cpu" else (_device(run).memory_stats() or {}).get("bytes_limit")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or math.floor(host / len(run.mesh.local_devices))
