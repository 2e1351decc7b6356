"""Scaling cases: what is on each number of devices, what is refused."""

import pytest

from eval import scaling
from eval.common import UsageError, freeze, load_config


def test_cases_are_parsed_and_divided():
    case = scaling.parse_case("seq@64 rows=2 remat=full")
    assert (case.axis, case.length, case.rows, case.strong, case.remat) == ("seq", 64, 2, 0, "full")
    assert [case.shape(n, 4) for n in (1, 2, 4)] == [(2, 16), (2, 32), (2, 64)]
    assert [case._replace(strong=1).shape(n, 4) for n in (1, 4)] == [(2, 64), (2, 64)]
    rows = scaling.parse_case("fsdp@64 rows=8")
    assert [rows.shape(n, 4) for n in (1, 4)] == [(8, 64), (32, 64)]
    assert [rows._replace(strong=1).shape(n, 4) for n in (1, 4)] == [(8, 64), (8, 64)]
    assert [scaling.counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    with pytest.raises(UsageError, match="rows 8 must be a multiple of 3 devices"):
        rows._replace(strong=1).shape(3, 3)
    for text, message in (("time@64", "with a mesh axis"), ("seq@64 length=2", "unknown key 'length'")):
        with pytest.raises(ValueError, match=message):
            scaling.parse_case(text)


def test_every_setting_is_valid():
    for variant in ("full", "quick"):
        freeze(scaling.Settings, load_config("scaling", variant))
    with pytest.raises(ValueError, match="options names 'fast'"):
        freeze(scaling.Settings, {**load_config("scaling", "quick").to_dict(), "options": ("fast",)})
