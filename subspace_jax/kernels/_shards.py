"""Ops on shards: arrays sharded over Explicit mesh axes, and arrays within ``shard_map``.

A sharding over Auto axes is known only if the caller passes it.  Otherwise the compiler partitions the reference of an
op (it cannot partition a kernel: :func:`subspace_jax.kernels._dispatch.choose` selects the reference then).
"""

from collections.abc import Callable, Sequence

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, ManualAxisType, NamedSharding, PartitionSpec


def vary_alike(*args: jax.Array) -> tuple[jax.Array, ...]:
    """Makes all arrays vary over the mesh axes over which any does, within a ``shard_map`` that checks types."""
    varying = _varying(args)
    missing = (tuple(sorted(varying - jax.typeof(x).manual_axis_type.varying)) for x in args)
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(args, missing, strict=True))


def result(shape: Sequence[int], dtype: jax.typing.DTypeLike, *args: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a kernel's result, varying over the mesh axes of its arguments."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=_varying(args)))


def _varying(args: Sequence[jax.Array]) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))


def over_shards(
    f: Callable,
    rule: str,
    gathered: Sequence[str] = (),
    inside: Sequence[str] = (),
    sharding: NamedSharding | None = None,
) -> Callable:
    """Maps a function over the shards of its arguments, which are sharded over Explicit mesh axes or by ``sharding``.

    The rule names the axes of operands and results, one word each: in ``"b n, n p -> b"`` a device that holds some
    rows ``b`` computes those rows of the result.  A result is a sum over the axes that it lacks, and is summed over
    the devices that shard them.  ``vmap`` adds an axis to the rule.  Without Explicit axes and ``sharding``, ``f`` is
    called directly.

    Args:
      f: Function of arrays to an array or a tuple of arrays, valid for any sizes of the axes that may be sharded.
      rule: See above; operands and results are separated by commas.
      gathered: Axes that cannot be sharded: operands are gathered along them.
      inside: Axes that results lack and ``f`` reduces itself: it is called with a keyword of that name, the tuple of
        mesh axes that shard the axis, empty if none does.
      sharding: Sharding of the first operand over Auto mesh axes, which a traced array does not carry; ignored under
        Explicit axes.

    Returns:
      A function like ``f``, without the keywords of ``inside``.
    """
    operands, results = ([axes.split() for axes in side.split(",")] for side in rule.split("->"))

    def run(*args):
        told = not _explicit()
        specs = [_ways(sharding)] if told else [jax.typeof(x).sharding.spec for x in args]
        found = _mesh_axes(operands, specs, gathered)

        def spec(axes):
            return PartitionSpec(*(found.get(axis) for axis in axes))

        def on_shard(*args):
            outs, structure = jax.tree.flatten(f(*args, **{axis: found.get(axis, ()) for axis in inside}))
            for i, axes in enumerate(results):
                summed = [name for axis in found if axis not in (*axes, *inside) for name in found[axis]]
                outs[i] = jax.lax.psum(outs[i], tuple(summed)) if summed else outs[i]
            return structure.unflatten(outs)

        in_specs, out_specs = ([spec(axes) for axes in side] for side in (operands, results))
        out_specs = tuple(out_specs) if len(out_specs) > 1 else out_specs[0]
        if not told:
            args = [jax.sharding.reshard(x, s) for x, s in zip(args, in_specs, strict=True)]
        mesh = sharding.mesh if told else None
        return jax.shard_map(on_shard, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)(*args)

    def call(*args):
        if not _explicit() and (sharding is None or sharding.mesh.size == 1):
            return f(*args, **dict.fromkeys(inside, ()))
        batchable = custom_vmap(run)
        batchable.def_vmap(batched)
        return batchable(*args)

    def batched(size, in_batched, *args):
        del size
        name = f"batch{rule.count('batch')}"
        sides = [[name, *axes] if mapped else axes for axes, mapped in zip(operands, in_batched, strict=True)]
        longer = ", ".join(map(" ".join, sides)) + " -> " + ", ".join(" ".join([name, *axes]) for axes in results)
        in_axes = [0 if mapped else None for mapped in in_batched]

        def mapped_f(*args, **keywords):
            return jax.vmap(lambda *args: f(*args, **keywords), in_axes)(*args)

        longer_sharding = sharding
        if sharding is not None and in_batched[0]:
            longer_sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        outs = over_shards(mapped_f, longer, gathered, inside, longer_sharding)(*args)
        return outs, jax.tree.map(lambda _: True, outs)

    return call


def sharded_like(grad: jax.Array, x: jax.Array) -> jax.Array:
    """Reshards ``grad`` over Explicit mesh axes as ``x`` is sharded."""
    wanted = jax.typeof(x).sharding.spec
    return grad if jax.typeof(grad).sharding.spec == wanted else jax.sharding.reshard(grad, wanted)


def leading_axes(x: jax.Array, trailing: int) -> str:
    """Names the axes of ``x`` before the last ``trailing`` ones, for a rule of :func:`over_shards`."""
    return " ".join(f"axis{i}" for i in range(x.ndim - trailing))


def _ways(sharding: NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes of more than one device that shard each axis."""
    groups = [(names,) if isinstance(names, str) else (names or ()) for names in sharding.spec]
    return [tuple(name for name in group if sharding.mesh.shape[name] > 1) for group in groups]


def _explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _mesh_axes(operands, specs, gathered) -> dict[str, tuple[str, ...]]:
    """The mesh axes that shard each axis of a rule, by the first operand that is sharded along it."""
    found, taken = {}, set()
    for axes, spec in zip(operands, specs, strict=False):
        for axis, names in zip(axes, spec, strict=False):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if names and axis not in gathered and axis not in found and not taken & set(names):
                found[axis] = names
                taken |= set(names)
    return found
