"""Chips: peak rates, memory and links, from the vendors' pages, and the slices that exist.

Sources, read in November 2026:

- v5e, v5p, v6e: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of docs.cloud.google.com/tpu/docs (peak bf16 rate, memory
  rate, bidirectional interconnect bandwidth of a chip, number of ports).  A link's rate in one direction is that
  bandwidth over ports over two.  ``memory`` is the limit of the TPU compiler, a little below the memory of the chip.
- a100, h100, h200: NVIDIA's data sheets (80 GB A100 SXM, H100 SXM, H200 SXM): dense bf16 rate, memory rate, NVLink
  bandwidth, which counts both directions.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from subspace_jax.train.fields import nearest, shown


@dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      name: Name in a topology.
      platform: "tpu" or "cuda".
      flops: Peak rate of bfloat16 matmuls, FLOP/s.
      memory: Bytes available to a program.
      memory_rate: Bytes/s of main memory.
      link_rate: Bytes/s of one link in one direction; for GPUs of all links together.
      wraps: An axis of the torus is a ring if its number of chips is a multiple of this; otherwise it is a line, and a
        collective uses one direction only.
      slices: Available slices, smallest first; empty if any number of chips is valid.
    """

    name: str
    platform: str
    flops: float
    memory: int
    memory_rate: float
    link_rate: float
    wraps: int
    slices: tuple[str, ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, int(15.75 * _GIB), 819e9, 50e9, 16, _FLAT),
        Chip("v5p", "tpu", 459e12, int(95.73 * _GIB), 2765e9, 100e9, 4, _DEEP),
        Chip("v6e", "tpu", 918e12, int(31.24 * _GIB), 1638e9, 100e9, 16, _FLAT),
        Chip("a100", "cuda", 312e12, 80 * 10**9, 2039e9, 300e9, 1),
        Chip("h100", "cuda", 989e12, 80 * 10**9, 3350e9, 450e9, 1),
        Chip("h200", "cuda", 989e12, 141 * 10**9, 4800e9, 450e9, 1),
    )
}


def find_topology(topology: str) -> tuple[Chip, int]:
    """Parses a topology such as ``v5e:4x4``, ``v5p:4x4x8`` or ``h100:8``.

    Args:
      topology: Name of the chip, a colon, and the sides of a slice, or the number of GPUs.

    Returns:
      The chip, and the number of chips.

    Raises:
      ValueError: There is no such chip or slice; the message lists the known ones.
    """
    name, _, sides = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise ValueError(f"topology: no chip {name!r} in {topology!r}{nearest(name, CHIPS)}; {_known()}")
    if chip.slices and sides in chip.slices:
        return chip, math.prod(int(side) for side in sides.split("x"))
    if not chip.slices and sides.isdecimal() and len(sides) < 8 and int(sides) > 0:
        return chip, int(sides)
    raise ValueError(f"topology: {name} has no slice {shown(sides)}{nearest(sides, chip.slices)}; {_known()}")


def _known() -> str:
    slices = "; ".join(f"{chip.name}: {', '.join(chip.slices)}" for chip in CHIPS.values() if chip.slices)
    gpus = ", ".join(f"{chip.name}:N" for chip in CHIPS.values() if not chip.slices)
    return f"known are {slices}; and N GPUs {gpus}"


def topologies_of(chip: Chip, least: int = 8, most: int = 512) -> list[str]:
    """Returns the topologies of a chip from ``least`` to ``most`` chips, smallest first."""
    sides = chip.slices or [str(2**power) for power in range(11)]
    found = [f"{chip.name}:{side}" for side in sides]
    return [topology for topology in found if least <= find_topology(topology)[1] <= most]


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """Describes the devices of a TPU slice for ahead-of-time compilation, without the slice.

    Args:
      topology: As for :func:`find_topology`.

    Returns:
      The devices, in the order of ``jax.devices()`` on such a slice.

    Raises:
      ValueError: The slice is unknown, or the TPU compiler is not installed.
    """
    find_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology: {topology} is compiled by libtpu, which is not installed here; on Linux, "
            "`python -m pip install libtpu` adds it (no TPU is needed)"
        )
    # Before libtpu loads: outside Google's cloud it would wait for a metadata server, and for other processes that have
    # loaded it, though no TPU is used here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # A host has up to 2 x 2 chips; some compilers need to know of a narrower slice.
    sides = [int(side) for side in topology.partition(":")[2].split("x")]
    host = {} if min(sides[:2]) > 1 else {"chips_per_host_bounds": (min(sides[0], 2), min(sides[1], 2), 1)}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **host).devices
