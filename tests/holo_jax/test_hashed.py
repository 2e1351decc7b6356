"""A value with its hash."""

from holo_jax.generate.hashed import Hashed


def test_equal_values_are_equal_and_hashed_once() -> None:
    """So that a compiled function finds the program it has."""
    asked = []

    class Definition:
        def __hash__(self) -> int:
            asked.append(self)
            return 7

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Definition)

    one, other = Hashed(Definition()), Hashed(Definition())
    assert one == other and {one: 1}[other] == 1 and len(asked) == 2
    assert one != Hashed(3) and one != 7
