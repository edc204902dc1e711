"""The largest temporaries of a compiled module, and the lines of Python that they come from."""

from collections.abc import Mapping
from dataclasses import dataclass

from subspace_jax.planning.hlo import FREE, Array, Module, Op

# Instructions that hand on their first operand, perhaps in another form.
_FORWARDING = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape", "transpose", "get-tuple-element")


_LEAST = 1024  # bytes of an array that is worth a line


@dataclass(frozen=True)
class Temporary:
    """A large array that is neither argument nor result.

    Attributes:
      type: Type and shape, such as "bf16[8,128]".
      nbytes: Bytes with padding.
      source: Operation of the traced program, or empty if the compiler does not name it.
      line: Its line of Python, ``file:line``, or empty.
    """

    type: str
    nbytes: int
    source: str
    line: str = ""


def largest_temporaries(module: Module, number: int) -> tuple[Temporary, ...]:
    """Returns the largest results of instructions in main memory from 1 KiB on, one per type and source.

    Copies of an argument into on-chip memory, and what becomes a result of the program, are no temporaries.
    Temporaries with disjoint live ranges share memory, so that these do not add up to the total.

    Args:
      module: The module.
      number: Number of temporaries at most.
    """
    inner = {name for c in module.computations.values() for op in c.values() if op.opcode in ("fusion", "custom-call")
             for names in op.called().values() for name in names}  # fmt: skip
    results = _results(module)
    found: dict[tuple[str, str, str], int] = {}
    for name, ops in module.computations.items():
        if name in inner:
            continue
        for op in ops.values():
            if op.opcode in FREE or op.opcode.endswith(("-done", "-update")):
                continue
            if name == module.entry and op.name in results:
                continue
            for array in _made(op):
                if array.in_memory and array.padded_bytes >= _LEAST:
                    shown = f"{array.dtype}[{','.join(map(str, array.shape))}]"
                    found[shown, *_source(module, ops, op)] = array.padded_bytes
    ranked = sorted(found.items(), key=lambda item: -item[1])[:number]
    return tuple(Temporary(shown, nbytes, source, line) for (shown, source, line), nbytes in ranked)


def _results(module: Module) -> set[str]:
    """Returns the instructions of the entry whose arrays are results of the program."""
    ops = module.computations[module.entry]
    found, left = set(), [op.name for op in ops.values() if op.is_root]
    while left:
        name = left.pop()
        if name in ops and name not in found:
            found.add(name)
            if ops[name].opcode in ("tuple", "bitcast", "copy-done"):
                left += ops[name].operands
    return found


def _made(op: Op) -> tuple[Array, ...]:
    """Returns the arrays that an instruction makes; those that start something list operands too."""
    if op.opcode == "copy-start":
        return op.results[:1]
    return (op.made,) if op.opcode.endswith("-start") and op.opcode != "all-reduce-start" else op.results


def _source(module: Module, ops: Mapping[str, Op], op: Op) -> tuple[str, str]:
    """Returns operation and line of an instruction, or of what it forwards or fuses; empty if they are unknown."""
    while not op.source:
        if op.opcode == "fusion":
            ops = module.computations.get(op.called()["calls"][0], {})
            following = next((inside for inside in ops.values() if inside.is_root), None)
        elif op.opcode in _FORWARDING and op.operands:
            following = ops.get(op.operands[0])
        else:
            following = None
        if following is None:
            return "", ""
        op = following
    return op.source, module.lines.get(op.attribute("stack_frame_id") or "", "")
