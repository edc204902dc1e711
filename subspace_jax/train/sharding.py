"""From logical axis names to devices: one mesh, one table of rules, shardings of the whole train state.

Parameters carry names such as ``("embed", "mlp")``; a rule maps each name to mesh axes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any
Rules = Mapping[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "tensor")
SEQUENCE = "sequence"  # an axis that a mesh has only where its size is above 1

DEFAULT_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "sequence": SEQUENCE,
    "embed": ("fsdp", SEQUENCE),
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "class": "tensor",
    "rank": ("fsdp", SEQUENCE),
    "layers": None,
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """Arranges devices in a mesh with the axes ``data``, ``fsdp`` and ``tensor``, and ``sequence`` where it is asked.

    Args:
      data: Replicas, over which the batch is sharded; -1 takes the devices that are left.
      fsdp: Devices over which parameters and optimizer state are sharded, and the batch too.
      tensor: Devices over which single matrices are sharded, class subspaces along their class axis.
      sequence: Devices over which the positions of a sequence are sharded, in tasks that can (language models), and
        parameters and optimizer state too.
      devices: The devices to use; all of them by default.
      axis_type: Of all axes.  The steps of this package run with Auto axes, where the compiler places the collectives;
        on a mesh with Explicit axes they do the same, and the types of their arrays show the sharding.

    Returns:
      The mesh, ``tensor`` its last axis and ``sequence`` before it.  Devices lie along the links of a TPU slice, as JAX
      arranges them; where it can't, or where these two would go over several processes though they could stay inside
      one, they lie process by process, since every process reads examples of its own.

    Raises:
      ValueError: A size is neither positive nor -1, more than one is -1, the mesh is larger than the devices, or -1
        does not divide them.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, SEQUENCE: sequence, "tensor": tensor}
    if sequence == 1:
        del sizes[SEQUENCE]
    open_axes = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(open_axes) > 1:
        raise ValueError(f"mesh: sizes are positive, at most one of them -1; got {sizes}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > len(devices) or (open_axes and len(devices) % fixed):
        raise ValueError(
            f"mesh: {_show(sizes)} needs {'a multiple of ' if open_axes else ''}{fixed} devices, there are "
            f"{len(devices)} ({devices[0].platform})"
        )
    if open_axes:
        sizes[open_axes[0]] = len(devices) // fixed
    names, shape = tuple(sizes), tuple(sizes.values())
    used = devices[: math.prod(shape)]
    types = (axis_type,) * len(names)
    try:
        mesh = jax.make_mesh(shape, names, axis_types=types, devices=used)
    except NotImplementedError:  # no product of sides of the slice is the size of an axis
        mesh = None
    if mesh is None or _splits_processes(mesh.devices):
        by_process = np.empty(len(used), object)
        by_process[:] = sorted(used, key=lambda device: device.process_index)
        if mesh is None or not _splits_processes(by_process.reshape(shape)):
            return Mesh(by_process.reshape(shape), names, axis_types=types)
    return mesh


def _splits_processes(devices: np.ndarray) -> bool:
    """Whether the axes after the first two, which do not shard the batch, go over several processes."""
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
    processes = processes.reshape(*devices.shape[:2], -1)
    return bool(np.any(processes != processes[..., :1]))


def _show(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def to_partition_spec(names: P, shape: tuple[int, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> P:
    """Maps the logical names of one array to mesh axes.

    A mesh axis serves one dimension of an array only, and only where it divides the dimension evenly (ten classes
    don't divide among four devices); otherwise the dimension is replicated.

    Args:
      names: Logical name of each dimension, or None; may be shorter than ``shape``.
      shape: Shape of the array.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      A partition spec of mesh axes.

    Raises:
      ValueError: There are more names than dimensions, a name has no rule, or a rule names an axis that the mesh lacks.
    """
    if len(names) > len(shape):
        raise ValueError(f"axes {tuple(names)} name {len(names)} dimensions, the array has shape {shape}")
    taken: set[str] = set()
    spec = []
    for name, size in zip(names, shape, strict=False):
        axes: list[str] = []
        for axis in axes_of_name(name, mesh, rules) if name is not None else ():
            ways = math.prod(mesh.shape[a] for a in axes) * mesh.shape[axis]
            if axis not in taken and size % ways == 0:
                axes.append(axis)
        taken.update(axes)
        spec.append(tuple(axes) if len(axes) > 1 else (axes[0] if axes else None))
    return P(*spec)


def axes_of_name(name: str, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> tuple[str, ...]:
    """Returns the mesh axes to which a rule maps a logical name; without a rule for "sequence" it has none."""
    if name == "sequence" and name not in rules:
        return ()
    if name not in rules:
        raise ValueError(f"no sharding rule for the logical axis {name!r}; there are rules for {sorted(rules)}")
    axes = tuple(axis for axis in axes_of(rules[name]) if axis != SEQUENCE or axis in mesh.shape)
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise ValueError(f"the rule for {name!r} names mesh axes {missing}; the mesh has {list(mesh.axis_names)}")
    return axes


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """Returns the sharding of every array of a batch: examples over the data axes."""
    return NamedSharding(mesh, P(axes_of_name("batch", mesh, rules)))


def check_batch_size(
    batch_size: int, mesh: Mesh, rules: Rules = DEFAULT_RULES, accumulate: int = 1, name: str = "batch_size"
) -> None:
    """Raises a ValueError if a batch can't be sharded over the mesh, or divided into that many micro-batches.

    Every process has to hold as many examples as the others, and none that another one holds, for it reads its own.
    The processes are those of the mesh's devices, which may be described only; an abstract mesh has none.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 micro-batch, got {accumulate}")
    axes = axes_of_name("batch", mesh, rules)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size < 1 or batch_size % (ways * accumulate):
        raise ValueError(
            f"{name}: {batch_size} examples don't divide among {ways} devices "
            f"({_show({a: mesh.shape[a] for a in axes})}) x {accumulate} accumulated micro-batches; take a multiple of "
            f"{ways * accumulate}"
        )
    if isinstance(mesh, AbstractMesh):
        return
    num_processes = max(jax.process_count(), len({device.process_index for device in mesh.devices.flat}))
    shards = batch_sharding(mesh, rules).devices_indices_map((ways,))
    holders = {(rows.indices(ways)[0], device.process_index) for device, (rows,) in shards.items()}
    per_process = Counter(process for _, process in holders)
    if len(holders) > ways or len(per_process) < num_processes or len(set(per_process.values())) > 1:
        raise ValueError(
            f"mesh: {_show(mesh.shape)} gives the processes {dict(sorted(per_process.items()))} of {ways} shards of a "
            f"batch; each of {num_processes} processes needs as many, and none that another one holds "
            f"(the axes {', '.join(a for a in mesh.axis_names if a not in axes)} have to stay inside a process)"
        )


def param_shardings(shapes: PyTree, axes: PyTree, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> PyTree:
    """Maps the logical axes of a tree of arrays to shardings.

    Args:
      shapes: Tree of arrays or ``ShapeDtypeStruct``.
      axes: Tree of the same structure, of ``PartitionSpec`` of logical names.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      A tree of ``NamedSharding``.
    """
    return jax.tree.map(
        lambda x, names: NamedSharding(mesh, to_partition_spec(names, x.shape, mesh, rules)), shapes, axes
    )


def shard_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Returns the bytes of a tree on one device."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes with axes of type Auto: the mesh of constraints inside a step."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return mesh if mesh.axis_types == types else Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def opt_state_shardings(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree, rules: Rules = DEFAULT_RULES
) -> PyTree:
    """Gives each array of an optimizer's state the sharding of the parameter that it belongs to.

    The owner is the parameter with the longest path that ends the array's path, or all of it but its last part.  Which
    dimension of the array is which of the parameter shows when ``tx.init`` is evaluated on the shapes of ``params``
    and again on shapes whose sizes are all a little larger and distinct: one that is equal both times follows.  The
    others are ranks (a moment in a subspace of the rows, a basis): where the array has as many dimensions as the
    parameter, they take what the rule for ``"rank"`` names and the other dimensions leave free.  All else is
    replicated.

    Args:
      tx: The optimizer; its ``init`` works under ``jax.eval_shape``.
      params: The parameters, arrays or ``ShapeDtypeStruct``.
      shardings: Their shardings, ``NamedSharding`` on one mesh.
      rules: Logical name to mesh axis or axes; of them ``"rank"`` is used, and ranks are replicated without it.

    Returns:
      A tree of ``NamedSharding`` with the structure of the state.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    flat_shardings = treedef.flatten_up_to(shardings)
    if not flat:
        raise ValueError("opt_state_shardings: expected at least one parameter, got none")

    def evaluated(*, distinct):
        larger = _larger([x.shape for _, x in flat], distinct=distinct)
        shapes = (jax.ShapeDtypeStruct(shape, x.dtype) for shape, (_, x) in zip(larger, flat, strict=True))
        return larger, jax.eval_shape(tx.init, treedef.unflatten(shapes))

    tree = jax.eval_shape(tx.init, params)
    try:
        larger, probed = evaluated(distinct=True)
    except Exception:  # a check of sizes that two parameters share, one of which has another dimension of that size
        larger, probed = evaluated(distinct=False)
    mesh = flat_shardings[0].mesh
    owners = {
        tuple(_key(k) for k in path): (tuple(zip(x.shape, shape, strict=True)), sharding.spec)
        for (path, x), shape, sharding in zip(flat, larger, flat_shardings, strict=True)
    }

    # An optimizer may choose what it keeps by the sizes of a parameter, and then keep something else of the larger one.
    found = dict(jax.tree_util.tree_leaves_with_path(probed))

    def choose(path, leaf):
        names = tuple(_key(k) for k in path)
        for tail in (names, names[:-1]):  # the second for fields of what an optimizer keeps of one parameter
            for start in range(len(tail) + 1):
                if tail[start:] in owners:
                    other = None if path not in found else found[path].shape
                    spec = _following(leaf.shape, other, *owners[tail[start:]], mesh, rules)
                    return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(choose, tree)


def _larger(shapes: Sequence[tuple[int, ...]], *, distinct: bool) -> list[tuple[int, ...]]:
    """Larger sizes in the same order, equal where they were; of equal ones of one shape the first is the largest."""
    order = {size: i for i, size in enumerate(sorted({size for shape in shapes for size in shape}))}
    gap = 1 + max(map(len, shapes))
    return [
        tuple(
            size + gap * (1 + order[size]) + (shape[i + 1 :].count(size) if distinct else 0)
            for i, size in enumerate(shape)
        )
        for shape in shapes
    ]


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _following(
    shape: tuple[int, ...], probed: tuple[int, ...] | None, owner: Sequence[tuple[int, int]], owner_spec: P, mesh, rules
) -> P:
    """The spec of an array, by its shapes at both evaluations and the sizes of its parameter at both."""
    left = dict(enumerate(tuple(owner_spec) + (None,) * (len(owner) - len(owner_spec))))
    if probed is None or len(shape) != len(probed):
        return P(*left.values()) if shape == tuple(size for size, _ in owner) else P()
    spec: list[Any] = [None] * len(shape)
    ranks = []
    for i, sizes in enumerate(zip(shape, probed, strict=True)):
        if sizes in owner:  # the second dimension of a factor's product with itself is replicated
            spec[i] = left.pop(next((j for j in left if owner[j] == sizes), None), None)
        else:
            ranks.append(i)
    if len(shape) == len(owner):
        taken = {axis for entry in spec for axis in axes_of(entry)}
        free = tuple(axis for axis in axes_of(rules.get("rank")) if axis in mesh.shape and axis not in taken)
        entries = to_partition_spec(P(*["rank"] * len(ranks)), tuple(shape[i] for i in ranks), mesh, {"rank": free})
        for i, entry in zip(ranks, entries, strict=True):
            spec[i] = entry
    return P(*spec)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns an entry of a ``PartitionSpec`` as a tuple of mesh axes."""
    return (entry,) if isinstance(entry, str) else entry or ()


def to_device(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays from the examples that this process holds."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
