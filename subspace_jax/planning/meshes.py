"""Sizes of a mesh on a slice."""

import math
from collections.abc import Mapping

from subspace_jax.planning.chips import find_topology
from subspace_jax.train.fields import nearest


def mesh_sizes(sizes: Mapping[str, int], topology: str, count: int) -> dict[str, int]:
    """Completes the sizes of a mesh.

    Args:
      sizes: Axis to size, -1 for the remaining chips; missing axes are 1, ``data`` takes the remaining chips.
      topology: The slice, for messages.
      count: Number of chips.

    Returns:
      The sizes of all axes, in the order of a mesh; ``sequence`` only if it is above 1.

    Raises:
      ValueError: There is no such axis, or the sizes do not multiply to the number of chips.
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
            f"mesh: {shown} has {fixed} devices, {topology} has {count} chips; sizes have to multiply to {count}, such "
            f"as fsdp={count // near[min(1, len(near) - 1)]}, tensor={near[min(1, len(near) - 1)]}, or give --mesh"
        )
    return filled


def usual_meshes(topology: str) -> list[dict[str, int]]:
    """Returns meshes worth planning on a slice: weights sharded over all chips, or over 16 and replicated."""
    _, count = find_topology(topology)
    found = []
    for tensor in (1, 2, 4):
        for fsdp in (count // tensor, 16 // tensor):
            sizes = {"data": count // (fsdp * tensor) if fsdp else 0, "fsdp": fsdp, "tensor": tensor}
            if math.prod(sizes.values()) == count and sizes not in found:
                found.append(sizes)
    return found
