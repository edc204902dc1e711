"""Parses the text of a compiled module: operations, loops with trip counts, collectives with mesh axes."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0},
}
# Instructions without memory traffic of their own: views, or the second half of an asynchronous pair.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "iota", "copy-done", "opt-barrier", "domain", "get-dimension-size"),
}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=")


@dataclass(frozen=True)
class Array:
    """An array in the text.

    Attributes:
      dtype: HLO type.
      shape: Dimensions.
      in_memory: Whether it is in main memory (HBM); False for on-chip memory (VMEM, SMEM).
      padded_bytes: Bytes with the last dimensions padded to tiles.
    """

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool
    padded_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclass(frozen=True)
class Op:
    """One instruction: results, operands, and the rest of its line."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    literal: str = ""
    is_root: bool = False

    def attribute(self, name: str) -> str | None:
        """Returns the value of ``name=value``, one word or the content of braces; None if it is missing."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.rest)
        return found[1].strip("{}") if found else None

    def called(self) -> dict[str, list[str]]:
        """Returns the computations that it calls, by role."""
        found: dict[str, list[str]] = {}
        for match in _CALLED.finditer(self.rest):
            text = self.rest[match.end() :]
            text = text[: text.index("}")] if text.startswith("{") else text.split(",")[0].split(" ")[0]
            found[match[1]] = _NAME.findall(text)
        return found

    @property
    def made(self) -> Array:
        """The result array; an asynchronous start lists its operands before it and counters after."""
        arrays = [array for array in self.results if array.shape] or list(self.results)
        return arrays[-1] if self.opcode.endswith("-start") else self.results[0]

    @property
    def source(self) -> str:
        """Its source in the traced program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].replace("\\'", "'") if found else ""


@dataclass(frozen=True)
class Module:
    """A module.

    Attributes:
      computations: Each a dict of instructions by name.
      entry: Name of the entry computation.
      lines: Number of a stack frame to its line of Python, ``file:line``.
    """

    computations: Mapping[str, Mapping[str, Op]] = field(default_factory=dict)
    entry: str = ""
    lines: Mapping[str, str] = field(default_factory=dict)


def parse_module(text: str) -> Module:
    """Parses the output of ``compiled.as_text()``.

    Args:
      text: The optimized HLO of one module.

    Returns:
      Its computations.

    Raises:
      ValueError: There is no entry computation.
    """
    computations: dict[str, dict[str, Op]] = {}
    entry, current = "", None
    lines = text.splitlines()
    for line in lines:
        if not line.startswith(" "):
            if line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
                current = computations.setdefault(name, {})
                entry = name if line.startswith("ENTRY ") else entry
            elif line.startswith("}"):
                current = None
        elif current is not None and (op := _parse_op(line)) is not None:
            current[op.name] = op
    if not entry:
        raise ValueError("text: expected the text of a compiled module, found no entry computation in it")
    return Module(computations, entry, _frame_lines(lines))


def _frame_lines(text: Sequence[str]) -> dict[str, str]:
    """Returns the line of Python of each stack frame, from the tables before the first computation."""
    tables: dict[str, dict[str, str]] = {"FileNames": {}, "FileLocations": {}, "StackFrames": {}}
    current: dict[str, str] = {}
    for line in text:
        if line.startswith(("%", "ENTRY ")):
            break
        number, _, value = line.partition(" ")
        if number.isdecimal():
            current[number] = value
        elif line:
            current = tables.get(line, {})
    lines = {}
    for frame, value in tables["StackFrames"].items():
        location = tables["FileLocations"].get(_field(value, "file_location_id"), "")
        file = tables["FileNames"].get(_field(location, "file_name_id"), "").strip('"')
        if file:
            lines[frame] = f"{_short(file)}:{_field(location, 'line')}"
    return lines


def _field(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\d+)", text)
    return found[1] if found else ""


def _short(path: str) -> str:
    """Returns a path of a Python file without what differs between machines: from its package, or its folder, on."""
    _, installed, module = path.rpartition("site-packages/")
    if installed:
        return module
    parts = path.split("/")
    begin = max((i for i, part in enumerate(parts[:-1]) if part == "subspace_jax"), default=len(parts) - 2)
    return "/".join(parts[max(begin, 0) :])


def _parse_op(line: str) -> Op | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    right = re.sub(r"/\*index=\d+\*/", "", right)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    start = right.find("(", end)
    if end <= 0 or start < 0:
        return None
    stop = _closing(right, start)
    inside = right[start + 1 : stop]
    return Op(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=right[end:start].strip(),
        results=parse_arrays(right[:end]),
        operands=tuple(_NAME.findall(inside)),
        rest=right[stop + 1 :],
        literal=inside,
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return len(text) - 1


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type, that of an array or a tuple."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(d) for d in dims.split(",") if d)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, shape, space is None or space[1] == "0", _padded(dtype, shape, layout)))
    return tuple(found)


def _bits(dtype: str) -> int:
    return 8 if dtype.startswith("f8") else _BITS.get(dtype, 32)


def _padded(dtype: str, shape: tuple[int, ...], layout: str) -> int:
    """Returns bytes with the minor dimensions padded to tiles, by the first tile of the layout."""
    order, _, tiles = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    sizes = list(shape)
    if tile and shape:
        minor = [int(d) for d in order.split(",") if d]
        for dim, step in zip(minor, reversed([int(t) for t in tile[1].split(",")]), strict=False):
            sizes[dim] = -(-sizes[dim] // step) * step
    return math.prod(sizes) * _bits(dtype) // 8


def trip_count(module: Module, computation: Mapping[str, Op], loop: Op) -> int | None:
    """Returns the number of iterations of a ``while``.

    The CPU compiler states it; for TPUs it follows from the condition, which compares a counter with a constant, and
    the initial value of the counter.

    Args:
      module: The module.
      computation: The computation that contains the loop.
      loop: The ``while``.

    Returns:
      The number, or None if it depends on data.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition = module.computations.get(loop.called()["condition"][0], {})
    begin = computation.get(loop.operands[0])
    root = next((op for op in condition.values() if op.is_root), None)
    arguments: dict[int, Op] = {}
    inside = condition
    if root is not None and root.opcode == "fusion":
        arguments = {i: condition[name] for i, name in enumerate(root.operands)}
        inside = module.computations.get(root.called()["calls"][0], {})
        root = next((op for op in inside.values() if op.is_root), None)
    if root is None or root.opcode != "compare" or begin is None:
        return None

    def value(op: Op | None, where: Mapping[str, Op]) -> tuple[int | None, bool]:
        """Returns the value of an operand at the first comparison, and whether the loop carries it."""
        while op is not None and op.opcode in ("copy", "bitcast", "convert", "reshape"):
            op = where.get(op.operands[0])
        if op is None:
            return None, False
        if op.opcode == "constant":
            return (int(op.literal), False) if re.fullmatch(r"-?\d+", op.literal) else (None, False)
        if op.opcode == "parameter" and where is inside and arguments:
            return value(arguments.get(int(op.literal)), condition)
        if op.opcode == "get-tuple-element" and begin.opcode == "tuple":
            first = begin.operands[int(op.attribute("index") or 0)]
            return value(computation.get(first), computation)[0], True
        return None, False

    (left, left_moves), (right, right_moves) = (value(inside.get(name), inside) for name in root.operands)
    if left is None or right is None or not (left_moves or right_moves):
        return None
    direction = root.attribute("direction")
    spans = {"LT": right - left, "LE": right - left + 1, "GT": left - right, "GE": left - right + 1, "NE": right - left}
    return abs(spans[direction]) if direction in spans else None


def replica_groups(text: str) -> list[tuple[int, ...]]:
    """Returns the device groups of a collective, from any of their forms in HLO.

    Args:
      text: The part of the instruction after its operands.

    Returns:
      Groups of device indices in the order of the mesh; empty if the text has none.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        return [tuple(int(d) for d in pair.split(",")) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text)
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        # 'axis':(outer)size is a part of an axis, inside an outer part and outside an inner one.
        parts = {
            n: (int(o or 1), int(s or axes[n])) for n, o, s in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])
        }
        dims, used = [], []
        for name, size in axes.items():
            outer, part = parts.get(name, (size, 1))
            used += [len(dims) + 1] if name in parts else []
            dims += [outer, part, size // (outer * part)]
        order = [i for i in range(len(dims)) if i not in used] + used
        devices = _iota(named[2]) if named[2] else np.arange(math.prod(dims))
        return _rows(devices.reshape(dims).transpose(order), math.prod(dims[i] for i in used))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _rows(_iota(iota[2]), int(iota[1]))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    return [tuple(int(d) for d in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []


def _iota(text: str) -> np.ndarray:
    """Returns device indices in the order of ``[sides]T(permutation)``, or of a list."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return np.array([int(d) for d in re.findall(r"\d+", text)])
    dims = [int(d) for d in found[1].split(",")]
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose([int(d) for d in found[2].split(",")]) if found[2] else devices


def _rows(devices: np.ndarray, size: int) -> list[tuple[int, ...]]:
    return [tuple(int(d) for d in row) for row in devices.reshape(-1, size)]


def axis_of(groups: Sequence[tuple[int, ...]], mesh: Mapping[str, int], *, pairs: bool = False) -> str:
    """Returns the mesh axis, or axes joined by "+", of device groups.

    Args:
      groups: From :func:`replica_groups`.
      mesh: Axis to size, in the order of the mesh.
      pairs: Whether the groups are pairs of source and target, which need not cover an axis.

    Returns:
      The name; "all" without groups, "?" if the groups match no axis.
    """
    long = [name for name, size in mesh.items() if size > 1]
    devices = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    if pairs:
        found = [np.stack(np.unravel_index(g, devices.shape)) for g in groups]
        moved = {name for c in found for name, row in zip(mesh, c, strict=True) if row[0] != row[1]}
        return "+".join(name for name in long if name in moved) or "?"
    wanted = {frozenset(g) for g in groups}
    for count in range(1, len(long) + 1):
        for names in itertools.combinations(long, count):
            order = [i for i, n in enumerate(mesh) if n not in names] + [i for i, n in enumerate(mesh) if n in names]
            rows = _rows(devices.transpose(order), math.prod(mesh[n] for n in names))
            if {frozenset(row) for row in rows} == wanted:
                return "+".join(names)
    return "all" if not groups else "?"
