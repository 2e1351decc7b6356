"""What ``eval.scaling`` measures, as text: a mesh axis, a length, and how the model and its devices run."""

import re
from typing import Any, NamedTuple

from eval.common import UsageError
from holo_jax.exchange import Exchange
from holo_jax.parallel import BATCH_AXES, MESH_AXES, SEQ
from train.compilation import JOINED


class Case(NamedTuple):
    """``AXIS@LENGTH[ key=value ...]``: what is measured on one device and on all.

    Attributes:
      axis: the mesh axis that the devices lie on.
      length: tokens in a sequence, of all devices together along ``seq``.
      rows: sequences of one device; of all together if ``strong``, and along ``seq``.
      strong: 1 keeps the whole problem the same on one device, 0 the share of a device.
      remat, unroll, model, block: of the model; ``block`` is its ``block_backend``. What one device runs and
        a mesh does not (along ``seq`` and ``tensor``) is no loss of scaling: name there what both run.
      reshard_after_forward, reduce_dtype, transport, in_order: of the mesh (``holo_jax.exchange``); 1 or 0,
        and names.
      joined: MiB up to which collectives are joined.
      overlap: 1 compiles as training does (``train.compilation``), 0 without its options.
      between: 1 measures powers of two between one device and all as well.
    """

    axis: str
    length: int
    rows: int = 1
    strong: int = 0
    remat: str = "dots"
    unroll: int = 1
    model: str = "holo"
    overlap: int = 1
    block: str = "auto"
    between: int = 1
    reshard_after_forward: int = 1
    reduce_dtype: str = "float32"
    transport: str = "collectives"
    joined: int = JOINED >> 20
    in_order: int = 1

    @property
    def exchange(self) -> Exchange:
        """How its devices send."""
        keep = bool(self.reshard_after_forward)
        return Exchange(keep, self.reduce_dtype, self.transport, bool(self.in_order))

    def shape(self, devices: int, largest: int) -> tuple[int, int]:
        """Rows and tokens of the batch on ``devices`` devices, of at most ``largest``.

        Raises:
          UsageError: if they do not divide.
        """
        rows, length = self.rows, self.length
        if not self.strong and self.axis == SEQ:
            length = length * devices // largest
        elif not self.strong and self.axis in BATCH_AXES:
            rows = rows * devices
        for name, size, over in (("rows", rows, BATCH_AXES), ("length", length, (SEQ,))):
            if self.axis in over and size % devices:
                raise UsageError(f"case {self}: {name} {size} must be a multiple of {devices} devices")
        return rows, length


def parse_case(text: str) -> Case:
    """The case written as ``text``.

    Raises:
      ValueError: for another form, an unknown axis or key.
    """
    match = re.fullmatch(r"(\w+)@(\d+)((?:\s+\w+=\w+)*)", text.strip())
    if not match or match[1] not in MESH_AXES:
        raise ValueError(f"case is {text!r}; it must look like seq@65536 rows=1 strong=1, with a mesh axis")
    kinds = Case.__annotations__
    options: dict[str, Any] = {}
    for pair in match[3].split():
        key, value = pair.split("=")
        if key not in kinds or key in ("axis", "length"):
            raise ValueError(f"case {text!r} has the unknown key {key!r}")
        options[key] = int(value) if kinds[key] is int else value
    case = Case(match[1], int(match[2]), **options)
    _ = case.exchange  # refuses what is none
    for name in ("strong", "overlap", "between", "reshard_after_forward", "in_order"):
        if getattr(case, name) not in (0, 1):
            raise ValueError(f"case {text!r} has {name} {getattr(case, name)}; it must be 0 or 1")
    return case


def counts(largest: int, between: int = 1) -> list[int]:
    """Numbers of devices that are measured: one, powers of two ``between``, and all."""
    powers = {2**k for k in range(largest.bit_length()) if 2**k <= largest}
    return sorted((powers if between else {1}) | {largest})
