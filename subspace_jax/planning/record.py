"""The plan of one program, as a record that JSON can hold."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from subspace_jax.planning.chips import find_topology
from subspace_jax.planning.cost import Collective
from subspace_jax.planning.roofline import Roofline
from subspace_jax.planning.temporaries import Temporary


class Speed(NamedTuple):
    """Estimated speed of all chips.

    Attributes:
      steps: Executions per second.
      amount: Tokens, images or examples per second, as :attr:`Plan.unit` says.
      mfu: Model FLOPs utilization: matmul FLOPs of the traced program over what the chips can do at their peak rate in
        the same time.  What ``remat`` computes again is in the traced program, and counts.
    """

    steps: float
    amount: float
    mfu: float


@dataclass(frozen=True)
class Plan:
    """The cost of one program; all bytes, FLOPs and seconds are per chip.

    Attributes:
      program: "step", "step of PHASE" if a run has several phases, or "evaluation NAME".
      topology: The slice, such as "v5e:4x4".
      mesh: Axis to size.
      examples: Examples in a batch, over all chips.
      amount: Tokens, images or examples in a batch, over all chips.
      unit: "tokens", "images" or "examples".
      params: Bytes of the trained parameters: the sum of their shards, as are the next four.
      optimizer: Bytes of the optimizer state.
      variables: Bytes of the rest of the state: frozen weights, running statistics, counters.
      batch: Bytes of the batch.
      limit: Bytes available to a program.
      needed_flops: Matmul FLOPs of the traced program divided by the number of chips, for any sharding.
      model: Bytes of the arrays that an evaluator prepares beside the state.
      padding: Bytes of the arguments beyond this sum: the compiler pads arrays to tiles.
      temporaries: Bytes of activations, gradients and other temporaries; None if the program is not compiled.
      code: Bytes of the program, and of results that are not in place of arguments.
      total: Sum of all above; of a program that the compiler refuses, the bytes that it needs.
      flops: Matmul FLOPs of the compiled program.
      memory_bytes: Bytes read from and written to main memory; for GPUs, by matmuls and the optimizer only.
      collectives: Collectives by kind and axis; None if the program is not compiled.
      largest: The largest temporaries.
      open_loops: Loops of unknown length, counted once.
      time: Roofline estimate; None if the program was refused.
      compile_seconds: Compile time.
      refusal: Message of the compiler that refused the program, or empty.
    """

    program: str
    topology: str
    mesh: Mapping[str, int]
    examples: int
    params: int
    optimizer: int
    variables: int
    batch: int
    limit: int
    needed_flops: int
    model: int = 0
    padding: int = 0
    temporaries: int | None = None
    code: int = 0
    total: int = 0
    flops: int = 0
    memory_bytes: int = 0
    collectives: tuple[Collective, ...] | None = None
    largest: tuple[Temporary, ...] = ()
    open_loops: int = 0
    time: Roofline | None = None
    compile_seconds: float = 0.0
    refusal: str = ""
    amount: int = 0
    unit: str = "examples"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.mesh.values())

    @property
    def arguments(self) -> int:
        """Bytes of state, batch and prepared arrays, without padding."""
        return self.params + self.optimizer + self.variables + self.model + self.batch

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of a chip; for GPUs, whether state and batch do."""
        return not self.refusal and self.total <= self.limit

    @property
    def speeds(self) -> dict[str, Speed]:
        """Speeds by the roofline times, "best" with full overlap and "worst" without; empty if they are unknown."""
        if self.time is None or self.time.best <= 0 or not self.examples:
            return {}
        peak = find_topology(self.topology)[0].flops
        return {
            name: Speed(1 / seconds, self.amount / seconds, self.needed_flops / (seconds * peak))
            for name, seconds in (("best", self.time.best), ("worst", self.time.worst))
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON values, and what follows from them: times, speeds, and whether it fits."""
        times = None
        if self.time is not None:
            times = {
                name: getattr(self.time, name) for name in ("compute", "memory", "network", "best", "worst", "bound")
            }
        speeds = {name: speed._asdict() for name, speed in self.speeds.items()}
        derived = {"mesh": dict(self.mesh), "time": times, "speeds": speeds, "fits": self.fits}
        return {**dataclasses.asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Returns the plan that :meth:`as_dict` wrote, also after JSON."""
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        time, collectives = fields["time"], fields["collectives"]
        fields["time"] = None if time is None else Roofline(time["compute"], time["memory"], time["network"])
        fields["collectives"] = None if collectives is None else tuple(Collective(**c) for c in collectives)
        fields["largest"] = tuple(Temporary(**t) for t in fields["largest"])
        return cls(**fields)
