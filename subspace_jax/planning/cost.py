"""The cost of a compiled module on one device: matmul FLOPs, memory traffic, collectives, and large arrays."""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from subspace_jax.planning.convolution import convolution_flops
from subspace_jax.planning.hlo import FREE, Module, Op, axis_of, parse_module, replica_groups, trip_count
from subspace_jax.planning.temporaries import Temporary, largest_temporaries

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class CollectiveKey(NamedTuple):
    """Kind, mesh axis, and devices per group."""

    kind: str
    axis: str
    devices: int


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along one axis.

    Attributes:
      kind: Name in HLO, such as "all-gather".
      axis: Mesh axis or axes, see :func:`subspace_jax.planning.hlo.axis_of`.
      devices: Devices per group.
      count: Number of executions.
      nbytes: Bytes over all executions: of gathered results, of the operands of a reduction on one device, or sent.
    """

    kind: str
    axis: str
    devices: int
    count: int
    nbytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of one execution on one device.

    Attributes:
      flops: FLOPs of matmuls and convolutions.
      memory_bytes: Bytes read from and written to main memory by all instructions.
      collectives: Collectives by kind and axis, largest first.
      temporaries: The largest temporaries, largest first.
      open_loops: Loops whose trip count depends on data; their bodies are counted once.
    """

    flops: int
    memory_bytes: int
    collectives: tuple[Collective, ...]
    temporaries: tuple[Temporary, ...]
    open_loops: int


class _Sum(NamedTuple):
    flops: int
    memory: int
    counts: Counter
    payload: Counter
    open_loops: int


def module_cost(text: str, mesh: Mapping[str, int], num_temporaries: int = 5) -> Cost:
    """Counts the cost of a compiled module; the body of a loop counts once per iteration.

    Of a conditional, the branch with the larger memory traffic counts.  ``flops`` excludes elementwise operations.

    Args:
      text: The output of ``compiled.as_text()``.
      mesh: Axis to size, in the order of the mesh.
      num_temporaries: Number of largest temporaries to list.

    Returns:
      The cost.

    Raises:
      ValueError: The text is not that of a compiled module.
    """
    module = parse_module(text)
    total = _Counting(module, mesh).computation(module.entry)
    found = [Collective(*key, total.counts[key], total.payload[key]) for key in total.counts]
    return Cost(
        total.flops,
        total.memory,
        tuple(sorted(found, key=lambda c: -c.nbytes)),
        largest_temporaries(module, num_temporaries),
        total.open_loops,
    )


class _Counting:
    """One walk over a module."""

    def __init__(self, module: Module, mesh: Mapping[str, int]):
        self.module, self.mesh = module, mesh
        self.computation = functools.cache(self._computation)
        self.flops = functools.cache(self._flops)

    def _computation(self, name: str) -> _Sum:
        """Returns the sum over a computation that is no fusion, and all that it calls."""
        ops = self.module.computations[name]
        flops = memory = open_loops = 0
        counts, payload = Counter(), Counter()
        seen = set()  # channels of collectives that consist of several fusions
        for op in ops.values():
            flops += self._op_flops(op, ops)
            memory += self._traffic(op, ops)
            for found, where in self._collectives(op, ops):
                channel = found.attribute("channel_id")
                if where is not ops:
                    if channel in seen:
                        continue
                    seen.add(channel)
                key, nbytes = self._collective(found, where)
                counts[key] += 1
                payload[key] += nbytes
            for inner, times in self._inner(op, ops):
                flops += times * inner.flops
                memory += times * inner.memory
                open_loops += inner.open_loops + (op.opcode == "while" and trip_count(self.module, ops, op) is None)
                for key in inner.counts:
                    counts[key] += times * inner.counts[key]
                    payload[key] += times * inner.payload[key]
        return _Sum(flops, memory, counts, payload, open_loops)

    def _inner(self, op: Op, ops: Mapping[str, Op]) -> list[tuple[_Sum, int]]:
        called = op.called()
        if op.opcode == "while":
            times = trip_count(self.module, ops, op)
            return [(self.computation(called["body"][0]), 1 if times is None else times)]
        if op.opcode == "conditional":
            names = [name for role in called.values() for name in role]
            return [(max((self.computation(name) for name in names), key=lambda s: (s.memory, s.flops)), 1)]
        if op.opcode in ("call", "async-start"):
            return [(self.computation(name), 1) for name in called.get("to_apply", called.get("calls", []))]
        return []

    def _flops(self, name: str) -> int:
        ops = self.module.computations.get(name, {})
        return sum(self._op_flops(op, ops) for op in ops.values())

    def _op_flops(self, op: Op, ops: Mapping[str, Op]) -> int:
        opcode = op.opcode.removesuffix("-start")
        if opcode == "dot":
            left = ops[op.operands[0]].results[0].shape
            contracted = [int(d) for d in (op.attribute("lhs_contracting_dims") or "").split(",") if d]
            return 2 * math.prod(op.made.shape) * math.prod(left[d] for d in contracted)
        if opcode == "convolution":
            return convolution_flops(op, ops)
        if opcode == "fusion":
            return self.flops(op.called()["calls"][0])
        if opcode == "custom-call" and (stated := re.search(r'"flops":"?(\d+)', op.rest)):
            return int(stated[1])
        return 0

    def _collectives(self, op: Op, ops: Mapping[str, Op]):
        """Yields the collective that an instruction is, or those inside a fusion."""
        if op.opcode.removesuffix("-start") in KINDS:
            yield op, ops
        elif op.opcode in ("fusion", "fusion-start"):
            inside = self.module.computations.get(op.called()["calls"][0], {})
            for inner in inside.values():
                yield from self._collectives(inner, inside)

    def _collective(self, op: Op, ops: Mapping[str, Op]) -> tuple[CollectiveKey, int]:
        kind = op.opcode.removesuffix("-start")
        groups = replica_groups(op.rest)
        pairs = kind == "collective-permute"
        devices = 2 if pairs else len(groups[0]) if groups else math.prod(self.mesh.values())
        nbytes = sum(array.nbytes for name in op.operands for array in ops[name].results)
        if kind == "all-gather":
            nbytes *= devices
        return CollectiveKey(kind, axis_of(groups, self.mesh, pairs=pairs), devices), nbytes

    def _traffic(self, op: Op, ops: Mapping[str, Op]) -> int:
        """Returns the bytes that an instruction reads from and writes to main memory."""
        if op.opcode in FREE or op.opcode.endswith(("-done", "-update")) or op.opcode == "async-start":
            return 0
        if "AllocateBuffer" in op.rest:
            return 0
        written = sum(array.nbytes for array in op.results if array.in_memory)
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        if op.opcode == "dynamic-update-slice":
            return 2 * _memory_bytes(ops.get(op.operands[1]))
        if op.opcode in ("slice-start", "dynamic-slice-start"):
            return op.made.nbytes * (1 + op.made.in_memory)
        if op.opcode.endswith("-start"):
            return written  # its results include its operands
        if op.opcode != "fusion":
            return written + _read(op, ops)
        inside = self.module.computations.get(op.called()["calls"][0], {})
        if any("AsyncCollectiveDone" in inner.rest for inner in inside.values()):
            return 0
        written = 0
        roots = self._roots(inside)
        for i, array in enumerate(op.results):
            root, where = roots[i] if i < len(roots) else (None, inside)
            if not array.in_memory or (root is not None and (root.opcode == "parameter" or root.opcode in KINDS)):
                continue  # forwarded, or a part of a collective that was counted at its start
            if root is not None and root.opcode == "dynamic-update-slice":
                written += _memory_bytes(where[root.operands[1]], force=True)
            else:
                written += array.nbytes
        for number, name in enumerate(op.operands):
            nbytes = _memory_bytes(ops.get(name))
            if nbytes:
                elements = math.prod(ops[name].results[0].shape)
                written += int(nbytes * min(1.0, self._used_elements(inside, number) / max(elements, 1)))
        return written

    def _roots(self, inside: Mapping[str, Op]) -> list[tuple[Op, Mapping[str, Op]]]:
        """Returns the roots of a fusion's results, each with its computation; fusions nest."""
        root = next((op for op in inside.values() if op.is_root), None)
        if root is None:
            return []
        found = []
        for op in [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]:
            where = inside
            while op.opcode in ("bitcast", "fusion"):
                if op.opcode == "bitcast":
                    op = where[op.operands[0]]
                    continue
                inner = self._roots(self.module.computations.get(op.called()["calls"][0], {}))
                if len(inner) != 1:
                    break
                if inner[0][0].opcode == "parameter":  # a value of the outer fusion
                    break
                op, where = inner[0]
            found.append((op, where))
        return found

    def _used_elements(self, inside: Mapping[str, Op], number: int) -> float:
        """Returns the number of elements that a fusion reads of one argument, perhaps slices only."""
        parameter = next((x for x in inside.values() if x.opcode == "parameter" and x.literal == str(number)), None)
        return self._used_of(parameter.name, inside) if parameter else math.inf

    def _used_of(self, name: str, inside: Mapping[str, Op]) -> float:
        total = 0.0
        for op in inside.values():
            if name not in op.operands:
                continue
            if op.opcode in ("dynamic-slice", "slice", "gather") and op.operands[0] == name:
                total += math.prod(op.results[0].shape)
            elif op.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
                total += self._used_of(op.name, inside)
            elif op.opcode == "fusion":
                inner = self.module.computations.get(op.called()["calls"][0], {})
                total += self._used_elements(inner, op.operands.index(name))
            elif op.opcode == "dynamic-update-slice" and op.operands[0] == name:
                continue  # elements outside the update are neither read nor written
            elif op.opcode == "tuple" or op.opcode in KINDS:
                continue
            else:
                return math.inf
        return total


def _memory_bytes(op: Op | None, *, force: bool = False) -> int:
    return sum(array.nbytes for array in op.results if array.in_memory or force) if op else 0


def _read(op: Op, ops: Mapping[str, Op]) -> int:
    return sum(_memory_bytes(ops.get(name)) for name in op.operands)
