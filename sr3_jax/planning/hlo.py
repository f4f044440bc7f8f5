"""Reads a compiled program's text: what goes between the chips, and what goes between a chip and its memory.

XLA's own cost analysis counts the body of a loop once; a training step with accumulation, and every sampler, is a
loop. Here each computation counts as often as it runs. All numbers are of one chip.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
# These move no bytes: they name, group or order what others have made, or wait for it.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "iota"),
}

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"\s([a-z][a-z\-0-9]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        arrays: of its result: (bytes, whether it stays in the fast memory on the chip).
        called: role -> computations.
    """

    name: str
    operation: str
    arrays: tuple[tuple[float, bool], ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    text: str

    @property
    def bytes(self) -> float:
        """Of the whole result."""
        return sum(size for size, _ in self.arrays)

    @property
    def slow_bytes(self) -> float:
        """Of what of the result lies in the chip's main memory."""
        return sum(size for size, fast in self.arrays if not fast)


@dataclass
class Traffic:
    """Of one run of a program, on one chip.

    Attributes:
        memory: bytes read from and written to its memory, were nothing kept on the chip from one operation to the next.
        collectives: kind -> [how many, bytes that a ring sends from this chip].
        unknown_loops: loops whose number of rounds could not be read; they count once.
    """

    memory: float = 0.0
    collectives: dict[str, list[float]] = field(default_factory=dict)
    unknown_loops: int = 0

    def add(self, other: Traffic, times: int = 1) -> None:
        """`other`, that many times over."""
        self.memory += times * other.memory
        for kind, (count, size) in other.collectives.items():
            mine = self.collectives.setdefault(kind, [0, 0.0])
            mine[0] += times * count
            mine[1] += times * size
        self.unknown_loops += other.unknown_loops


def traffic(text: str, *, devices: int) -> Traffic:
    """The traffic of a program, from `compiled.as_text()`; `devices` is how many chips it runs on."""
    computations, entry = _parse(text)
    known: dict[str, Traffic] = {}

    def of(name: str) -> Traffic:
        if name not in known:
            known[name] = total = Traffic()
            sizes = {line.name: line for line in computations.get(name, ())}
            for line in sizes.values():
                total.add(_own(line, sizes, devices))
                for role, called in line.called.items():
                    if role in ("branch_computations", "true_computation", "false_computation"):
                        continue
                    for inner in called:
                        _enter(total, line, role, of(inner), computations)
                branches = [
                    of(inner) for role in line.called for inner in line.called[role] if "_comp" in role
                ]
                if branches:  # one of them runs: the one with the most traffic
                    total.add(max(branches, key=lambda branch: branch.memory))
        return known[name]

    return of(entry)


def _enter(
    total: Traffic, line: Instruction, role: str, inner: Traffic, computations: dict[str, list[Instruction]]
) -> None:
    if line.operation == "while":
        rounds = _rounds(line, computations)
        if role == "body":
            total.add(inner, 1 if rounds is None else rounds)
            total.unknown_loops += rounds is None
    elif line.operation == "call" or (line.operation == "async-start" and role == "calls"):
        total.add(inner)
    elif line.operation == "fusion":  # what is inside stays on the chip, but for a collective that was fused
        collectives = {kind: list(value) for kind, value in inner.collectives.items()}
        if any("all-reduce-scatter" in name for name in line.called["calls"]) and "all-reduce" in collectives:
            count, size = collectives.pop(
                "all-reduce"
            )  # whose result is sliced at once: half the way of a ring
            collectives["reduce-scatter"] = [count, size / 2]
        total.add(Traffic(collectives=collectives))


def _own(line: Instruction, lines: dict[str, Instruction], devices: int) -> Traffic:
    operation, kind = line.operation, line.operation.removesuffix("-start")
    if operation in FREE or operation.endswith(("-done", "-update")):
        return Traffic()
    read = [lines[name] for name in dict.fromkeys(line.operands) if name in lines]
    result = Traffic()
    if kind in COLLECTIVES:
        given = sum(operand.bytes for operand in read)
        result.collectives[kind] = [1, _ring(kind, given, _group(line.text, devices))]
    if operation in ("copy-start", "slice-start"):  # (source, result, context): from one memory to another
        moved = min(size for size, _ in line.arrays[:2])
        result.memory = moved * sum(not fast for _, fast in line.arrays[:2])
    elif operation == "dynamic-update-slice" and len(read) > 1:  # in place
        result.memory = 2 * read[1].slow_bytes
    elif operation in ("slice", "dynamic-slice", "gather"):  # reads as much as it makes
        result.memory = 2 * line.slow_bytes
    elif not operation.endswith("-start") or kind in COLLECTIVES:
        made = 0.0 if operation.endswith("-start") else line.slow_bytes  # a start names its operands again
        result.memory = made + sum(operand.slow_bytes for operand in read)
    return result


def _ring(kind: str, given: float, group: int) -> float:
    """Bytes that each chip of a ring sends for one collective of which it gives so many."""
    if kind == "collective-permute":
        return float(given)
    away = (group - 1) / group
    if kind == "all-gather":
        return given * (group - 1.0)
    return given * away * (2 if kind == "all-reduce" else 1)


def _group(text: str, devices: int) -> int:
    """How many chips take part in each of a collective's groups."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if counted:
        return int(counted[2])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if meshed:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", meshed[2]))
    return devices


def _rounds(line: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop runs: as XLA notes it, else the constant that its counter, from 0 by 1, is compared with."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.text)
    if noted:
        return int(noted[1])
    condition = computations.get(line.called.get("condition", ("",))[0], [])
    constants = {
        one.name: int(found[1]) for one in condition if (found := re.search(r"constant\((\d+)\)", one.text))
    }
    for one in condition:
        below = one.operation == "compare" and "direction=LT" in one.text
        limits = [constants[name] for name in one.operands if name in constants]
        if (below or one.operation == "fusion") and len(limits) == 1:
            return limits[0]
    return None


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for row in text.splitlines():
        head = _HEAD.match(row)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (line := _INSTRUCTION.match(row)):
            current.append(_instruction(line[1], line[2]))
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    text = text.split(", metadata=")[0] + " " + text.partition("backend_config=")[2]
    shape, operation, rest = _split(text)
    arrays = tuple(
        (_bytes(kind) * _items(sides, layout), "S(1)" in layout)
        for kind, sides, layout in _ARRAY.findall(shape)
    )
    inside, _, after = rest.partition(")")
    called = {role: tuple(_NAME.findall(names) or [names]) for role, names in _CALLED.findall(after)}
    return Instruction(name, operation, arrays, tuple(_NAME.findall(inside)), called, text)


def _split(text: str) -> tuple[str, str, str]:
    """'SHAPE OPERATION(REST' -> its three parts; a tuple's shape has brackets of its own."""
    start, depth = 0, 0
    if text.startswith("("):
        for start, letter in enumerate(text):  # noqa: B007  where it stops is what is wanted
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                break
    found = _OPERATION.search(text, start)
    if not found:
        return text, "", ""
    return text[: found.start()], found[1], text[found.end() :]


def _items(sides: str, layout: str) -> int:
    """How many items an array takes: a TPU lays it out in tiles, {1,0:T(8,128)}, and fills up the last of them."""
    shape = [int(side) for side in sides.split(",") if side]
    found = re.match(r"\{([\d,]*):T\(([\d,]+)\)", layout)
    if found:
        order = [int(axis) for axis in found[1].split(",") if axis]  # the innermost axis first
        tile = [int(side) for side in found[2].split(",")]
        for axis, side in zip(order, reversed(tile), strict=False):
            shape[axis] += -shape[axis] % side
    return math.prod(shape)


def _bytes(kind: str) -> float:
    if kind in ITEM_BYTES:
        return ITEM_BYTES[kind]
    bits = re.fullmatch(r"[suf](\d+)\w*", kind)
    return int(bits[1]) / 8 if bits else 0
