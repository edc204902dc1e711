"""A time from counts: what the chip's rates allow at best."""

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_jax.planning.chips import Chip
from subspace_jax.planning.cost import Collective

ASSUMPTIONS = (
    "products at the peak bfloat16 rate, memory and links at their stated rates, nothing lost between operations",
    "a collective runs alone, as a ring on one link of each chip: both directions where the ring closes, one where not",
    "at best compute, memory and network overlap wholly (the longest of the three); at worst not at all (their sum)",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one chip.

    Attributes:
      compute: Products at the peak rate.
      memory: Traffic with main memory.
      network: All collectives, one after the other; None where they are not known.
    """

    compute: float
    memory: float
    network: float | None

    @property
    def best(self) -> float:
        """The longest of the three: all overlap."""
        return max(self.compute, self.memory, self.network or 0.0)

    @property
    def worst(self) -> float:
        """Their sum: nothing overlaps."""
        return self.compute + self.memory + (self.network or 0.0)

    @property
    def bound(self) -> str:
        """Which of "compute", "memory" and "network" takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "network": self.network or 0.0}
        return max(times, key=times.__getitem__)


def roofline(chip: Chip, flops: float, memory_bytes: float, collectives: Sequence[Collective] | None) -> Roofline:
    """Returns the time that the chip's rates allow, see ``ASSUMPTIONS``.

    Args:
      chip: The chip.
      flops: FLOPs of a step on one chip.
      memory_bytes: Bytes of main memory that are read and written.
      collectives: The collectives; None where they are not known.

    Returns:
      The three times.
    """
    network = None if collectives is None else sum(collective_seconds(chip, c) for c in collectives)
    return Roofline(flops / chip.flops, memory_bytes / chip.memory_rate, network)


def collective_seconds(chip: Chip, collective: Collective) -> float:
    """Returns the time of all runs of a collective on a ring (Austin et al., "How to Scale Your Model", part 3).

    With V bytes as the collective has them, n chips and rate w of the ring: gathering and reduce-scatter take
    V (n-1)/n / w, an all-reduce twice that, an all-to-all V (n-1) / 4w (a share goes over a quarter of the ring on
    average), sending to one neighbour V over the rate of one link.  GPUs reach each other through a switch, where an
    all-to-all takes V (n-1)/n / w.
    """
    closed = chip.platform != "tpu" or collective.devices % chip.wraps == 0
    rate = chip.link_rate * (2 if closed and chip.platform == "tpu" else 1)
    moved = collective.nbytes * (collective.devices - 1) / max(collective.devices, 1)
    if collective.kind == "all-reduce":
        return 2 * moved / rate
    if collective.kind == "all-to-all":
        return moved / rate * (collective.devices / 4 if chip.platform == "tpu" else 1.0)
    if collective.kind == "collective-permute":
        return collective.nbytes / chip.link_rate
    return moved / rate
