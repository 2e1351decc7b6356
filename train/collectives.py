"""What a compiled program sends between devices, read from its text: for tests and measurements."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_NAME = re.compile(r'op_name="([^"]*)"')
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_LIST_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: one of ``KINDS``.
      shapes: dtype and dimensions of each array of its result, on one device.
      devices: how many devices take part in one exchange.
      name: path of the operation in the traced function; ``while/body`` in it is the inside of a loop.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    name: str

    @property
    def in_loop(self) -> bool:
        """Whether it is in the body of a loop, such as that over layers: it may run many times."""
        return "while/body" in self.name

    @property
    def bytes(self) -> int:
        """Bytes of the result on one device, for one run of the operation."""
        return sum(_itemsize(dtype) * math.prod(dims) for dtype, dims in self.shapes)


def collectives(text: str) -> list[Collective]:
    """The collectives among several devices in ``compiled.as_text()``.

    Raises:
      ValueError: for device groups written in a way that is not known here.
    """
    found = []
    for line in text.splitlines():
        match = _OPERATION.search(line)
        if match is None:
            continue
        shapes = tuple(
            (dtype, tuple(int(size) for size in dims.split(",") if size))
            for dtype, dims in _ARRAY.findall(_result(match[1]) if match[3] else match[1])
        )
        name = _NAME.search(line)
        one = Collective(match[2], shapes, _group_size(line), name[1] if name else "")
        if one.devices > 1:
            found.append(one)
    return found


def _result(shape: str) -> str:
    """Of ``((operands), results, ...)``, the shape of the start of an asynchronous operation, its results.

    Of one operation on several arrays the results are a tuple as well.
    """
    if not shape.startswith("(("):
        return shape
    depth, parts, begin = 0, [], 1
    for index, letter in enumerate(shape):
        depth += {"(": 1, "[": 1, "{": 1}.get(letter, 0) - {")": 1, "]": 1, "}": 1}.get(letter, 0)
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[begin:index])
            begin = index + 1
    return parts[1]


def _group_size(line: str) -> int:
    if "source_target_pairs=" in line:
        return 2
    if (mesh := _MESH_GROUPS.search(line)) is not None:
        sizes = dict(axis.split("=") for axis in mesh[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(","))
    if (iota := _IOTA_GROUPS.search(line)) is not None:
        return int(iota[1])
    if (listed := _LIST_GROUPS.search(line)) is not None:
        return len(listed[1].split(","))
    raise ValueError(f"the device groups of this operation cannot be read: {line.strip()[:300]}")


def _itemsize(dtype: str) -> int:
    if dtype == "pred":
        return 1
    return int(re.findall(r"\d+", dtype)[0]) // 8
