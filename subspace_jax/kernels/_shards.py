"""Ops on shards: arrays sharded over Explicit mesh axes, and arrays within ``shard_map``.

What is sharded over Auto axes is seen only where the caller says how.  Otherwise the compiler splits the reference of
an op by itself, and can't split a kernel (:func:`subspace_jax.kernels._dispatch.choose` takes the reference then).
"""

from collections.abc import Callable, Sequence

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, ManualAxisType, NamedSharding, PartitionSpec


def vary_alike(*args: jax.Array) -> tuple[jax.Array, ...]:
    """Within a ``shard_map`` that checks types, makes all arrays vary over the mesh axes over which any does."""
    varying = _varying(args)
    missing = (tuple(sorted(varying - jax.typeof(x).manual_axis_type.varying)) for x in args)
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(args, missing, strict=True))


def result(shape: Sequence[int], dtype: jax.typing.DTypeLike, *args: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a kernel's result, varying over mesh axes as its arguments do."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType(varying=_varying(args)))


def _varying(args: Sequence[jax.Array]) -> frozenset[str]:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))


def over_shards(
    f: Callable,
    rule: str,
    together: Sequence[str] = (),
    inside: Sequence[str] = (),
    sharding: NamedSharding | None = None,
) -> Callable:
    """Makes a function of whole arrays one of arrays that are sharded over Explicit mesh axes, or as the caller says.

    The rule names the axes of operands and results, one word for each: in ``"b n, n p -> b"`` a device that holds some
    rows ``b`` computes those rows of the result.  An axis that is missing from a result is one over which the result
    is a sum, and is summed over the devices that share the axis.  ``vmap`` adds an axis to the rule.  Without Explicit
    axes ``f`` is called as it is.

    Args:
      f: Function of arrays to an array or a tuple of arrays, right for any sizes of the axes that may be split.
      rule: As above, operands and results separated by commas.
      together: Axes that can't be split: operands are gathered along them.
      inside: Axes missing from results for which ``f`` does what is needed itself: it is called with a keyword of that
        name, the tuple of mesh axes over which the axis is split, empty where it isn't.
      sharding: Of the first operand, over Auto mesh axes, which no array tells of while it is traced; under Explicit
        axes it is not looked at.

    Returns:
      A function like ``f``, without the keywords of ``inside``.
    """
    operands, results = ([axes.split() for axes in side.split(",")] for side in rule.split("->"))

    def run(*args):
        told = not _explicit()
        specs = [_ways(sharding)] if told else [jax.typeof(x).sharding.spec for x in args]
        found = _mesh_axes(operands, specs, together)

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
        outs = over_shards(mapped_f, longer, together, inside, longer_sharding)(*args)
        return outs, jax.tree.map(lambda _: True, outs)

    return call


def _ways(sharding: NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis; one of size 1 splits nothing."""
    groups = [(names,) if isinstance(names, str) else (names or ()) for names in sharding.spec]
    return [tuple(name for name in group if sharding.mesh.shape[name] > 1) for group in groups]


def _explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _mesh_axes(operands, specs, together) -> dict[str, tuple[str, ...]]:
    """Over which mesh axes each axis of a rule is split; the first operand that splits one decides."""
    found, taken = {}, set()
    for axes, spec in zip(operands, specs, strict=False):
        for axis, names in zip(axes, spec, strict=False):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if names and axis not in together and axis not in found and not taken & set(names):
                found[axis] = names
                taken |= set(names)
    return found
