"""Plans a run before it is paid for: compiles its very step for a slice that need not be there, and counts."""

import dataclasses
import math
import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from subspace_jax.planning.chips import Chip, find_topology, tpu_devices
from subspace_jax.planning.cost import Collective, Cost, Temporary, module_cost
from subspace_jax.planning.flops import count_products
from subspace_jax.planning.roofline import Roofline, roofline
from subspace_jax.train.experiment import task_module
from subspace_jax.train.fields import nearest
from subspace_jax.train.optimizer import make_optimizer
from subspace_jax.train.sharding import batch_sharding, check_batch_size, make_mesh, shard_bytes
from subspace_jax.train.step import jit_train_step, state_shardings
from subspace_jax.train.task import Task

PyTree = Any


@dataclass(frozen=True)
class Plan:
    """What one step takes; all bytes, FLOPs and seconds are of one chip.

    Attributes:
      topology: The slice, such as "v5e:4x4".
      mesh: Axis to size.
      rows: Rows of a batch, over all chips.
      params: Bytes of the parameters that train: the sum of their shards, as are the next three.
      optimizer: Bytes of the optimizer's state.
      variables: Bytes of all else in the state: frozen weights, running statistics, counters.
      batch: Bytes of the batch.
      padding: What the arguments take beyond this sum, because the compiler fills arrays up to whole tiles.
      temporaries: Bytes of activations, gradients and all else that a step drops; None where no compiler says.
      code: Bytes of the program, and of results that lie beside the state.
      total: Sum of all above; for a program that the compiler refused, what it says is needed.
      limit: Bytes that a program may have.
      flops: Of products, as the program does them.
      needed_flops: The share of one chip in the products that the traced step has, however it is split.
      memory_bytes: Read from and written to main memory; for GPUs, of products and of the state alone.
      collectives: By kind and axis; None where no compiler says.
      largest: The largest temporaries.
      open_loops: Loops of unknown length, that were counted once.
      time: What the chip's rates allow; None where the program was refused.
      compile_seconds: What compiling took.
      refusal: Why the compiler refused the program, or empty.
    """

    topology: str
    mesh: Mapping[str, int]
    rows: int
    params: int
    optimizer: int
    variables: int
    batch: int
    padding: int
    temporaries: int | None
    code: int
    total: int
    limit: int
    flops: int
    needed_flops: int
    memory_bytes: int
    collectives: tuple[Collective, ...] | None
    largest: tuple[Temporary, ...]
    open_loops: int
    time: Roofline | None
    compile_seconds: float
    refusal: str = ""

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory; for GPUs, whether it has that of the state and the batch."""
        return not self.refusal and self.total <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Returns all as numbers and texts, for JSON."""
        times = None
        if self.time is not None:
            times = {
                name: getattr(self.time, name) for name in ("compute", "memory", "network", "best", "worst", "bound")
            }
        return {**dataclasses.asdict(self), "mesh": dict(self.mesh), "time": times, "fits": self.fits}


def plan_run(config: ConfigDict, topology: str, mesh: Mapping[str, int] | None = None) -> Plan:
    """Plans the train step that :func:`subspace_jax.train.run` would take with a config.

    For TPUs the step is compiled for the slice, on any Linux host with ``libtpu``; nothing is run and no array made.
    For GPUs it is traced and lowered but not compiled: state and FLOPs are known then, temporaries and collectives
    are not.

    The module that ``config.task`` names may have a function ``outline(config) -> Run``, which reads no data.  Without
    it, ``build`` is called.

    Args:
      config: The config of a run.
      topology: The slice, such as ``v5e:4x4``, or ``h100:8``.
      mesh: Axis to size; axes that are left out are 1, ``data`` takes what is left.  That of the config by default.

    Returns:
      The plan.

    Raises:
      ValueError: The topology is unknown, the mesh or the batch doesn't go into it, or libtpu is not there.
    """
    chip, count = find_topology(topology)
    module, config = task_module(config)
    sizes = mesh_sizes(config.mesh if mesh is None else mesh, topology, count)
    if chip.platform == "tpu":
        placed = make_mesh(**sizes, devices=tpu_devices(topology))
    else:
        placed = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    config.mesh.update({"sequence": 1, **sizes})
    phase = getattr(module, "outline", module.build)(config).phases[0]
    task, batch = phase.task, phase.data.batch
    rows = next(iter(batch.values())).shape[0]
    check_batch_size(rows, placed, accumulate=config.train.accumulate)
    # Its length is that of the schedule, which changes no shape; it has to be longer than the warm-up.
    tx = phase.tx or make_optimizer(
        config.optim, config.train.steps or config.optim.warmup_steps + 1000, task.roles()
    )
    options = {"accumulate": config.train.accumulate, "remat": config.train.remat}
    return plan_step(task, tx, batch, placed, topology, **options)


def mesh_sizes(sizes: Mapping[str, int], topology: str, count: int) -> dict[str, int]:
    """Fills up the sizes of a mesh.

    Args:
      sizes: Axis to size, -1 for what is left; axes that are not there are 1, ``data`` is what is left.
      topology: The slice, for messages.
      count: Its chips.

    Returns:
      The sizes of all axes, in the order of a mesh; ``sequence`` only where it splits something.

    Raises:
      ValueError: There is no such axis, or the product is not the number of chips.
    """
    filled = {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1}
    if unknown := sorted(set(sizes) - set(filled)):
        raise ValueError(f"mesh: expected axes among {tuple(filled)}, got {unknown}{nearest(unknown[0], filled)}")
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh: sizes are positive, or -1 for what is left; got {dict(sizes)}")
    filled |= dict(sizes)
    if filled["sequence"] == 1:
        del filled["sequence"]
    open_axes = [name for name, size in filled.items() if size == -1]
    fixed = math.prod(size for size in filled.values() if size != -1)
    if len(open_axes) == 1 and count % fixed == 0:
        filled[open_axes[0]] = count // fixed
    elif open_axes or fixed != count:
        shown = " x ".join(f"{name}={size}" for name, size in filled.items())
        near = [n for n in (2**k for k in range(12)) if count % n == 0]
        raise ValueError(
            f"mesh: {shown} has {fixed} places, {topology} has {count} chips; sizes have to multiply to {count}, such "
            f"as fsdp={count // near[min(1, len(near) - 1)]}, tensor={near[min(1, len(near) - 1)]}, or give --mesh"
        )
    return filled


def usual_meshes(topology: str) -> list[dict[str, int]]:
    """Returns meshes that are worth a try on a slice: weights split over all chips, or over 16 with copies of these."""
    _, count = find_topology(topology)
    found = []
    for tensor in (1, 2, 4):
        for fsdp in (count // tensor, 16 // tensor):
            sizes = {"data": count // (fsdp * tensor) if fsdp else 0, "fsdp": fsdp, "tensor": tensor}
            if math.prod(sizes.values()) == count and sizes not in found:
                found.append(sizes)
    return found


def plan_step(
    task: Task,
    tx: optax.GradientTransformation,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | AbstractMesh,
    topology: str,
    *,
    accumulate: int = 1,
    remat: str = "none",
) -> Plan:
    """Plans the step of a task of one's own, see :func:`plan_run`.

    Args:
      task: The method.
      tx: The optimizer.
      batch: Shapes of a batch over all processes.
      mesh: The mesh, of :func:`subspace_jax.planning.tpu_devices`, of devices that are there, or abstract.
      topology: Whose chips these are.
      accumulate: See :func:`subspace_jax.train.make_train_step`.
      remat: Likewise.

    Returns:
      The plan.
    """
    chip, _ = find_topology(topology)
    abstract, shardings = state_shardings(task, tx, mesh)
    rows = batch_sharding(mesh)
    sizes = {
        name: shard_bytes(getattr(abstract, field), getattr(shardings, field))
        for name, field in (("params", "params"), ("optimizer", "opt_state"))
    }
    sizes["variables"] = shard_bytes(abstract, shardings) - sum(sizes.values())
    sizes["batch"] = shard_bytes(batch, {name: rows for name in batch})
    known = {
        **{"topology": topology, "mesh": dict(mesh.shape), "rows": next(iter(batch.values())).shape[0]},
        **{"limit": chip.memory, **sizes},
    }
    traced = jit_train_step(task, tx, mesh, accumulate=accumulate, remat=remat).trace(abstract, dict(batch))
    products = count_products(traced.jaxpr)
    known["needed_flops"] = products.flops // math.prod(mesh.shape.values())
    state = sum(sizes.values())
    if isinstance(mesh, AbstractMesh):
        traced.lower(lowering_platforms=(chip.platform,))  # what can't be lowered for this platform shows here
        return _uncompiled(chip, state, products.nbytes // math.prod(mesh.shape.values()), known)
    began = time.monotonic()
    lowered = traced.lower()
    try:
        compiled, text = _compile(lowered, chip.platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error), state, known, time.monotonic() - began)
    seconds = time.monotonic() - began
    return _compiled(chip, compiled, text, state, known, seconds)


def _compile(lowered: Any, platform: str) -> tuple[Any, str]:
    """Compiles, and returns the text of the result as the compiler itself writes it.

    ``as_text`` has jaxlib parse what libtpu made, which a jaxlib that is older than libtpu can't always do.
    """
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # A cache of compiled programs can keep this one and can't load it: there is no such device here.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        texts = sorted(Path(folder).glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
        # A program that came from JAX's cache was not compiled, and has left nothing.
        return compiled, texts[-1].read_text() if texts else compiled.as_text()


def _compiled(chip: Chip, compiled: Any, text: str, state: int, known: dict, seconds: float) -> Plan:
    memory = compiled.memory_analysis()
    cost: Cost = module_cost(text, known["mesh"])
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes + max(beside, 0)
    return Plan(
        **known,
        padding=memory.argument_size_in_bytes - state,
        temporaries=memory.temp_size_in_bytes,
        code=code,
        total=memory.argument_size_in_bytes + memory.temp_size_in_bytes + code,
        flops=cost.flops,
        memory_bytes=cost.memory_bytes,
        collectives=cost.collectives,
        largest=cost.temporaries,
        open_loops=cost.open_loops,
        time=roofline(chip, cost.flops, cost.memory_bytes, cost.collectives),
        compile_seconds=seconds,
    )


def _refused(message: str, state: int, known: dict, seconds: float) -> Plan:
    reason = message.split("\n")[0].partition(": ")[2] or message
    needed = re.search(r"(?:required[^(]*\(|[Uu]sed )([\d.]+)([KMGT])", message)
    total = int(float(needed[1]) * 2 ** (10 * ("KMGT".index(needed[2]) + 1))) if needed else state
    return Plan(
        **known,
        padding=0,
        temporaries=None,
        code=0,
        total=max(total, state),
        flops=0,
        memory_bytes=0,
        collectives=None,
        largest=(),
        open_loops=0,
        time=None,
        compile_seconds=seconds,
        refusal=reason,
    )


def _uncompiled(chip: Chip, state: int, product_bytes: int, known: dict) -> Plan:
    # The optimizer reads and writes its state and the parameters once.
    memory_bytes = product_bytes + 2 * (known["params"] + known["optimizer"])
    return Plan(
        **known,
        padding=0,
        temporaries=None,
        code=0,
        total=state,
        flops=known["needed_flops"],
        memory_bytes=memory_bytes,
        collectives=None,
        largest=(),
        open_loops=0,
        time=roofline(chip, known["needed_flops"], memory_bytes, None),
        compile_seconds=0.0,
    )
