"""A static argument whose hash is worked out once."""

from typing import Any


class Hashed:
    """A value that a compiled function is given many times.

    The definition of a model of 12 layers takes 2 ms to hash, which every call of a compiled function does
    with its static arguments; eight tokens take as long.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hashed):
            return NotImplemented
        return self.value is other.value or (self._hash == other._hash and self.value == other.value)
