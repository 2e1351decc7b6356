"""One process per run directory: a live owner is respected, a dead one is not."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from train.errors import LockError, StorageError, UsageError
from train.lock import LOCK_FILE, RunLock, check_shared, read_lock


def test_a_second_owner_is_refused_by_name(tmp_path) -> None:
    first = RunLock(tmp_path)
    with pytest.raises(LockError, match=f"is in use by process {os.getpid()} on "):
        RunLock(tmp_path)
    first.close()
    RunLock(tmp_path).close()


def test_a_killed_owner_holds_nothing(tmp_path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from train.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LockError, match=f"process {process.pid}"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    RunLock(tmp_path).close()


def owned_elsewhere(path, age: float) -> None:
    (path / LOCK_FILE).write_text(json.dumps({"pid": 1, "host": "another", "since": 0}))
    then = time.time() - age
    os.utime(path / LOCK_FILE, (then, then))


def test_an_owner_on_another_machine_counts_while_it_renews(tmp_path) -> None:
    owned_elsewhere(tmp_path, 30)
    with pytest.raises(LockError, match="process 1 on another, seen 30 s ago"):
        RunLock(tmp_path)
    owned_elsewhere(tmp_path, 700)
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_damaged_lock_file_is_no_owner(tmp_path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    RunLock(tmp_path).close()


def test_the_owner_renews_the_time_stamp(tmp_path, monkeypatch) -> None:
    lock = RunLock(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    lock.check()
    assert os.stat(tmp_path / LOCK_FILE).st_mtime == 0  # not twice a minute
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 31)
    lock.check()
    assert os.stat(tmp_path / LOCK_FILE).st_mtime > 0
    lock.close()


def test_a_vanished_directory_is_noticed(tmp_path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    lock = RunLock(directory)
    shutil.rmtree(directory)
    with pytest.raises(StorageError, match="has vanished"):
        lock.check_present()
    directory.mkdir()
    other = RunLock(directory)
    with pytest.raises(StorageError, match="has vanished"):
        lock.check_present()
    other.close()
    lock.close()
    lock.close()


def test_an_unwritable_directory_is_named(tmp_path) -> None:
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        RunLock(tmp_path / "gone")


def test_another_directory_of_the_same_name_is_noticed(tmp_path) -> None:
    lock = RunLock(tmp_path)
    check_shared(tmp_path, read_lock(tmp_path))
    with pytest.raises(UsageError, match="is not the directory that process 0 works in"):
        check_shared(tmp_path / "elsewhere", read_lock(tmp_path), seconds=0.0)
    lock.close()
