"""The record of a run: every step once, whatever was cut, repeated or left over; full disks are named."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from train.errors import StorageError
from train.metrics import MetricsLog, iterate_rows


def record(path, last_step: int, rows, **kwargs) -> MetricsLog:
    log = MetricsLog(path, last_step, tensorboard=kwargs.get("tensorboard", False))
    for row in rows:
        log.write(row)
    log.sync()
    log.close()
    return log


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_once_after_going_back(tmp_path) -> None:
    record(tmp_path, 0, [{"step": s, "loss": float(s)} for s in range(1, 8)])
    log = record(tmp_path, 4, [{"step": s, "loss": -1.0} for s in range(5, 9)])
    assert steps(tmp_path) == list(range(1, 9))
    assert [row["loss"] for row in iterate_rows(tmp_path / "metrics.jsonl")][3:5] == [4.0, -1.0]
    assert log.missing_steps(4) == 0 and [row["step"] for row in log.recent] == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut: int) -> None:
    record(tmp_path, 0, [{"step": 1}, {"step": 2}])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    record(tmp_path, 1, [{"step": 2}])
    assert steps(tmp_path) == [1, 2]


def test_damaged_and_repeated_lines_are_dropped_and_counted(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n{"step": 1}\nrubbish\n[]\n{"step": "x"}\n{"step": 3}\n'
    )
    log = record(tmp_path, 3, [])
    assert steps(tmp_path) == [1, 3]
    assert log.missing_steps(3) == 1


def test_numbers_are_exact_and_non_finite_ones_null(tmp_path) -> None:
    record(tmp_path, 0, [{"step": 1, "loss": 0.1 + 0.2, "grad_norm": float("nan"), "x": float("-inf")}])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 0.1 + 0.2,
        "grad_norm": None,
        "x": None,
    }


def tensorboard_view(directory) -> dict[int, list[float]]:
    """Scalars by step as TensorBoard shows them: a restart drops what older files say of later steps."""
    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    seen: dict[int, list[float]] = {}
    for event in events:
        if event.session_log.status == SessionLog.START:
            seen = {step: values for step, values in seen.items() if step < event.step}
        for value in event.summary.value:
            seen.setdefault(event.step, []).append(round(value.simple_value, 4))
    return seen


def test_tensorboard_agrees(tmp_path) -> None:
    record(tmp_path, 0, [{"step": s, "loss": float(s)} for s in range(1, 8)], tensorboard=True)
    record(tmp_path, 4, [{"step": s, "loss": -1.0} for s in range(5, 7)], tensorboard=True)
    assert tensorboard_view(tmp_path / "tensorboard") == {
        1: [1.0],
        2: [2.0],
        3: [3.0],
        4: [4.0],
        5: [-1.0],
        6: [-1.0],
    }


def test_unwritable_directory_is_named(tmp_path) -> None:
    with pytest.raises(StorageError, match="the record cannot be written: No such file"):
        MetricsLog(tmp_path / "gone", 0, tensorboard=False)


def test_full_disk_is_named(tmp_path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log._file.close()
    with (
        open("/dev/full", "ab", buffering=0) as log._file,
        pytest.raises(StorageError, match="No space left"),
    ):
        log.write({"step": 1})
