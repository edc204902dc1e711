"""From logical axis names to devices: one mesh, one table of rules, shardings for the whole train state.

Parameters carry names such as ``("embed", "mlp")``; a rule maps each name to mesh axes.  Optimizer state takes its
sharding from the parameter that it belongs to, which is found by path: an array at ``…/momentum/head/bases`` belongs to
the parameter ``head/bases``.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any
Rules = Mapping[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "tensor")
SEQUENCE = "sequence"  # an axis that a mesh has only where it splits something

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
      data: Replicas that split the batch; -1 takes the devices that are left.
      fsdp: Ways in which parameters and optimizer state are split; the batch is split along it too.
      tensor: Ways in which single matrices are split, class subspaces along their class axis.
      sequence: Ways in which the places of a row are split, in tasks that can (language models); parameters and
        optimizer state are split along it too.
      devices: The devices to use; all of them by default.
      axis_type: Of all axes.  The steps of this package run with Auto axes, where the compiler places the collectives;
        on a mesh with Explicit axes they take and return arrays whose types show how they are split, and do the same.

    Returns:
      The mesh, ``tensor`` its last axis and ``sequence`` before it.  Devices lie along the links of a TPU slice, as JAX
      arranges them; where it can't, or where these two would go over several processes though they could stay inside
      one, they lie process by process, since every process reads rows of its own.

    Raises:
      ValueError: A size is neither positive nor -1, more than one is -1, the mesh is larger than the devices, or -1
        can't be filled evenly.
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
    """Whether the axes after the first two, which do not split the batch, go over several processes."""
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(devices)
    processes = processes.reshape(*devices.shape[:2], -1)
    return bool(np.any(processes != processes[..., :1]))


def _show(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def to_partition_spec(names: P, shape: tuple[int, ...], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> P:
    """Maps the logical names of one array to mesh axes.

    A mesh axis serves one dimension of an array only, and only where it divides the dimension evenly (ten classes
    can't be split over four devices); otherwise the dimension stays whole.

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
    """The mesh axes to which a rule maps a logical name; rules without ``"sequence"`` split no places."""
    if name == "sequence" and name not in rules:
        return ()
    if name not in rules:
        raise ValueError(f"no sharding rule for the logical axis {name!r}; there are rules for {sorted(rules)}")
    axes = tuple(axis for axis in axes_of(rules[name]) if axis != SEQUENCE or axis in mesh.shape)
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise ValueError(f"the rule for {name!r} names mesh axes {missing}; the mesh has {list(mesh.axis_names)}")
    return axes


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """The sharding of every array of a batch: rows split over the data axes."""
    return NamedSharding(mesh, P(axes_of_name("batch", mesh, rules)))


def check_batch_size(
    batch_size: int, mesh: Mesh, rules: Rules = DEFAULT_RULES, accumulate: int = 1, name: str = "batch_size"
) -> None:
    """Raises a ValueError if a batch can't be split over the mesh, or into that many micro-batches.

    With several processes, each has to hold an equal share of the rows, and no row may belong to two: every process
    reads its own.  The processes are those of the mesh's devices, which may be described and not there; an abstract
    mesh has none.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 micro-batch, got {accumulate}")
    axes = axes_of_name("batch", mesh, rules)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size < 1 or batch_size % (ways * accumulate):
        raise ValueError(
            f"{name}: {batch_size} rows don't split over {ways} devices ({_show({a: mesh.shape[a] for a in axes})}) "
            f"x {accumulate} accumulated micro-batches; take a multiple of {ways * accumulate}"
        )
    if isinstance(mesh, AbstractMesh):
        return
    num_processes = max(jax.process_count(), len({device.process_index for device in mesh.devices.flat}))
    shares = batch_sharding(mesh, rules).devices_indices_map((ways,))
    holders = {(rows.indices(ways)[0], device.process_index) for device, (rows,) in shares.items()}
    per_process = Counter(process for _, process in holders)
    if len(holders) > ways or len(per_process) < num_processes or len(set(per_process.values())) > 1:
        raise ValueError(
            f"mesh: {_show(mesh.shape)} gives the processes {dict(sorted(per_process.items()))} of {ways} shares of a "
            f"batch; every one of {num_processes} processes needs as many, and none that another one holds "
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


def gather(tree: PyTree, axes: PyTree, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> PyTree:
    """Gathers arrays over the mesh axes that split rows or places, before they are used; works under ``jax.jit`` only.

    This is what "fully sharded" means: an array is stored in shares, and whole (but for ``tensor``) where it meets rows
    of the batch.  Left to itself, the compiler may instead split a product over its contracted dimension by the axis
    that already splits its rows; on a mesh of 2 x 2 x 2 the gradient then comes out wrong (JAX 0.10.2, forwards right).

    Stacks with a logical axis ``"layers"`` are left as they are: gathered here, all layers would be whole at once.  The
    task that scans over them applies :func:`layer_gatherer` inside the scan.

    Args:
      tree: Tree of arrays.
      axes: Their logical axes, as :meth:`subspace_jax.train.Task.axes` gives them.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      The same arrays.
    """
    return jax.tree.map(lambda x, names: x if "layers" in names else _whole(x, names, mesh, rules), tree, axes)


def layer_gatherer(axes: PyTree, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Callable[[PyTree], PyTree]:
    """Returns what gathers the parameters of one layer, as :func:`gather` does, where a scan runs it.

    Args:
      axes: Logical axes of the stacked parameters, ``"layers"`` the first of each.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
    """
    return lambda layer: jax.tree.map(lambda x, names: _whole(x, P(*names[1:]), mesh, rules), layer, axes)


def _whole(x: jax.Array, names: P, mesh: Mesh, rules: Rules) -> jax.Array:
    if mesh.size == 1:
        # A constraint makes another array of it, and a scan keeps a copy of that for its backward pass.
        return x
    batch_axes = axes_of_name("batch", mesh, rules) + axes_of_name("sequence", mesh, rules)
    groups = [axes_of(entry) for entry in to_partition_spec(names, x.shape, mesh, rules)]
    spec = P(*(tuple(axis for axis in group if axis not in batch_axes) or None for group in groups))
    return jax.lax.with_sharding_constraint(x, NamedSharding(auto_mesh(mesh), spec))


def shard_positions(x: jax.Array, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> jax.Array:
    """Splits an array ``[batch, length, ...]`` of activations by rows and places; works under ``jax.jit`` only.

    Args:
      x: The array; it is handed on as it is on a mesh that splits no places.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
    """
    if not axes_of_name("sequence", mesh, rules):
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - 2)
    spec = P(axes_of_name("batch", mesh, rules), axes_of_name("sequence", mesh, rules), *free)
    return jax.lax.with_sharding_constraint(x, NamedSharding(auto_mesh(mesh), spec))


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices and axes with axes of type Auto: the mesh of constraints inside a step."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return mesh if mesh.axis_types == types else Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def jit_on_mesh(
    function: Callable,
    mesh: Mesh,
    out_shardings: PyTree,
    *,
    in_shardings: PyTree = None,
    donate_argnums: int | tuple = (),
) -> Callable:
    """Compiles a function of sharded arrays, whatever the type of the mesh's axes.

    On Explicit axes its body runs with Auto ones: the same program, and results typed by ``out_shardings``.

    Args:
      function: Takes and returns pytrees of arrays.
      mesh: The mesh on which they live.
      out_shardings: Shardings of the results, or one for all.
      in_shardings: Of the arguments; by default as they come.
      donate_argnums: As for ``jax.jit``.
    """
    if AxisType.Explicit in mesh.axis_types:
        function = jax.sharding.auto_axes(function, out_sharding=out_shardings)
    given = {} if in_shardings is None else {"in_shardings": in_shardings}
    return jax.jit(function, out_shardings=out_shardings, donate_argnums=donate_argnums, **given)


def follow_params(tree: PyTree, params: PyTree, shardings: PyTree, rules: Rules = DEFAULT_RULES) -> PyTree:
    """Gives each array of an optimizer state the sharding of the parameter that it belongs to.

    The owner is the parameter with the longest path that ends the array's path, or all of it but its last part.  An
    array of the parameter's shape takes its sharding; one whose shape leaves out some of the parameter's dimensions (a
    second moment for each subspace, a row or column statistic) takes the axes of those that it keeps.  So does one that
    has others in their place (a moment in a subspace of the rows, a basis): these are ranks, and take what the rule for
    ``"rank"`` names and the dimensions that are kept leave free.  Anything else is replicated.

    Args:
      tree: The optimizer state, arrays or ``ShapeDtypeStruct``.
      params: The parameters, likewise.
      shardings: Their shardings, ``NamedSharding`` on one mesh.
      rules: Logical name to mesh axis or axes; of them ``"rank"`` is used, and ranks stay whole without it.

    Returns:
      A tree of ``NamedSharding`` with the structure of ``tree``.
    """
    owners = {}
    flat_shardings = jax.tree.leaves(shardings)
    mesh = flat_shardings[0].mesh
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), flat_shardings, strict=True):
        owners[tuple(_key(k) for k in path)] = (leaf.shape, sharding.spec)

    def choose(path, leaf):
        whole = tuple(_key(k) for k in path)
        for names in (whole, whole[:-1]):  # the second for fields of what an optimizer keeps of one parameter
            for start in range(len(names) + 1):
                if names[start:] in owners:
                    return NamedSharding(mesh, _matching_spec(leaf.shape, *owners[names[start:]], mesh, rules))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(choose, tree)


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _matching_spec(shape: tuple[int, ...], owner_shape: tuple[int, ...], owner_spec: P, mesh: Mesh, rules: Rules) -> P:
    spec = tuple(owner_spec) + (None,) * (len(owner_shape) - len(owner_spec))
    kept, start = {}, 0
    for i, size in enumerate(shape):
        place = next((j for j in range(start, len(owner_shape)) if owner_shape[j] == size), None)
        if place is not None:
            kept[i], start = spec[place], place + 1
    ranks = [size for i, size in enumerate(shape) if i not in kept]
    # The inner product of a factor with itself, say, has the rank twice: small, and of no side of the parameter.
    if ranks and (len(shape) != len(owner_shape) or not set(ranks).isdisjoint(owner_shape)):
        return P()
    taken = {axis for entry in kept.values() for axis in axes_of(entry)}
    free = tuple(axis for axis in axes_of(rules.get("rank")) if axis in mesh.shape and axis not in taken)
    split = iter(to_partition_spec(P(*["rank"] * len(ranks)), tuple(ranks), mesh, {"rank": free}))
    return P(*(kept[i] if i in kept else next(split) for i in range(len(shape))))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns an entry of a ``PartitionSpec`` as a tuple of mesh axes."""
    return (entry,) if isinstance(entry, str) else entry or ()


def to_device(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays from the rows that this process holds."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


mesh_axes, resolve = axes_of_name, to_partition_spec
