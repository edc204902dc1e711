"""Roofline estimate of the time of a step from its counts."""

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_jax.planning.chips import Chip
from subspace_jax.planning.cost import Collective

ASSUMPTIONS = (
    "matmuls at the peak bfloat16 rate, memory and links at their stated rates, no time between operations",
    "collectives run one at a time, on one link of each chip: both directions of a ring, one direction of a line",
    "at best compute, memory and network overlap fully (the longest of the three); at worst not at all (their sum)",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one chip.

    Attributes:
      compute: Matmuls at the peak rate.
      memory: Memory traffic.
      network: All collectives, one after another; None if they are unknown.
    """

    compute: float
    memory: float
    network: float | None

    @property
    def best(self) -> float:
        """The longest of the three, with full overlap."""
        return max(self.compute, self.memory, self.network or 0.0)

    @property
    def worst(self) -> float:
        """The sum of the three, without overlap."""
        return self.compute + self.memory + (self.network or 0.0)

    @property
    def bound(self) -> str:
        """The longest of "compute", "memory" and "network"."""
        times = {"compute": self.compute, "memory": self.memory, "network": self.network or 0.0}
        return max(times, key=times.__getitem__)


def roofline(chip: Chip, flops: float, memory_bytes: float, collectives: Sequence[Collective] | None) -> Roofline:
    """Returns the times by the chip's rates, see ``ASSUMPTIONS``.

    Args:
      chip: The chip.
      flops: FLOPs of a step per chip.
      memory_bytes: Bytes read from and written to main memory.
      collectives: The collectives; None if they are unknown.

    Returns:
      The three times.
    """
    network = None if collectives is None else sum(collective_seconds(chip, c) for c in collectives)
    return Roofline(flops / chip.flops, memory_bytes / chip.memory_rate, network)


def collective_seconds(chip: Chip, collective: Collective) -> float:
    """Returns the time of all executions of a collective (Austin et al., "How to Scale Your Model", part 3).

    For V bytes (:attr:`Collective.nbytes`), n chips and the rate w of the ring: all-gather and reduce-scatter take
    V (n-1)/n / w, an all-reduce twice that, an all-to-all V (n-1) / 4w (a shard travels a quarter of the ring on
    average), a permute V over the rate of one link.  GPUs are connected by a switch, where an all-to-all takes
    V (n-1)/n / w.
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
