"""The batch of a step as a function of the rollbacks, by hand."""

import pytest

from train.decisions import (
    DECISIONS_FILE,
    Rollback,
    append_rollback,
    batch_of_step,
    before,
    effective,
    read_rollbacks,
)
from train.errors import StorageError


def rollback(to_step: int, batch: int) -> Rollback:
    return Rollback(to_step, batch, batch, "test")


def test_without_rollbacks_steps_read_their_own_batch() -> None:
    assert [batch_of_step(s, []) for s in range(3)] == [0, 1, 2]


def test_a_rollback_leaves_a_window_out() -> None:
    assert [batch_of_step(s, [rollback(2, 7)]) for s in range(5)] == [0, 1, 7, 8, 9]


def test_a_second_rollback_to_the_same_step_replaces_the_first() -> None:
    both = [rollback(2, 7), rollback(2, 12)]
    assert effective(both) == both[1:]
    assert [batch_of_step(s, both) for s in range(4)] == [0, 1, 12, 13]


def test_a_later_rollback_further_on_keeps_the_first() -> None:
    both = [rollback(2, 7), rollback(4, 20)]
    assert [batch_of_step(s, both) for s in range(6)] == [0, 1, 7, 8, 20, 21]


def test_a_rollback_further_back_undoes_the_first() -> None:
    both = [rollback(4, 9), rollback(2, 30)]
    assert effective(both) == both[1:]
    assert [batch_of_step(s, both) for s in range(4)] == [0, 1, 30, 31]


def test_a_checkpoint_has_behind_it_what_came_before_its_step() -> None:
    assert before(2, [rollback(2, 7)]) == []
    assert [r["batch"] for r in before(3, [rollback(2, 7), rollback(4, 20)])] == [7]


def test_file_round_trip_and_cut_last_line(tmp_path) -> None:
    assert read_rollbacks(tmp_path) == []
    append_rollback(tmp_path, rollback(2, 7))
    append_rollback(tmp_path, rollback(4, 20))
    assert read_rollbacks(tmp_path) == [rollback(2, 7), rollback(4, 20)]
    path = tmp_path / DECISIONS_FILE
    path.write_bytes(path.read_bytes() + b'{"to_step": 4')
    assert read_rollbacks(tmp_path) == [rollback(2, 7), rollback(4, 20)]
    append_rollback(tmp_path, rollback(6, 30))
    assert [r.to_step for r in read_rollbacks(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize(
    "line", [b"{}", b"3", b"[]", b"{", b'{"to_step":"a","batch":1,"at_step":1,"reason":""}']
)
def test_damaged_lines_are_refused(tmp_path, line: bytes) -> None:
    (tmp_path / DECISIONS_FILE).write_bytes(line + b"\n")
    with pytest.raises(StorageError, match="line 1 is damaged"):
        read_rollbacks(tmp_path)
