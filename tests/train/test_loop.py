"""Whole micro runs: resume, refusals, rollbacks, and every step recorded exactly once."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.train import child
from tests.train.common import Quiet, micro_config, read_curve
from train.decisions import read_rollbacks
from train.errors import (
    CheckpointError,
    DivergedError,
    LockError,
    MeshError,
    ResumeError,
    StorageError,
    UsageError,
)
from train.lock import RunLock
from train.loop import train
from train.preemption import StopRequest


def run(workdir, config=None, *, stop_after: int | None = None, **kwargs):
    """A run on one device, stopped after a step if asked; returns its result and the messages."""
    stop, display = StopRequest(), Quiet()

    def update(row) -> None:
        if row["step"] == stop_after:
            stop.set("SIGTERM")

    display.update = update
    result = train(
        config or micro_config(), workdir, devices=jax.devices()[:1], stop=stop, display=display, **kwargs
    )
    return result, display.messages


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    result, messages = run(workdir)
    return workdir, result, messages


def test_a_run_leaves_what_it_promises(uninterrupted) -> None:
    workdir, result, messages = uninterrupted
    assert result.step == 12 and result.stopped_by == ""
    curve = read_curve(workdir)
    assert [row[0] for row in curve] == list(range(1, 13))
    assert [row[1] for row in curve] == list(range(12))
    assert [row[0] for row in curve if row[-1] is not None] == [6, 12]
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "summary.json",
    }
    assert "in " + str(workdir) in messages[-2] and messages[-1].startswith("next:")
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {4, 8, 12}
    assert json.loads((workdir / "summary.json").read_text()) == result.summary
    assert result.summary["params"] == 4784 and result.summary["tokens"] == 12 * 8 * 16
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "new run" in messages[0]


def test_the_same_seed_gives_the_same_bits(uninterrupted, tmp_path) -> None:
    run(tmp_path / "again")
    assert read_curve(tmp_path / "again") == read_curve(uninterrupted[0])


@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_stopped_run_goes_on_exactly(uninterrupted, tmp_path, step: int) -> None:
    workdir = tmp_path / "run"
    result, _ = run(workdir, stop_after=step)
    # The record is one step late but at a save, so the stop comes up to one step after the row.
    reached = step if step % 4 == 0 else step + 1
    assert result.stopped_by == "SIGTERM" and result.step == reached and result.summary == {}
    assert (workdir / "checkpoints" / str(result.step)).exists()
    result, messages = run(workdir)
    assert result.step == 12 and f"going on from checkpoint {reached} in {workdir}" in messages
    assert read_curve(workdir) == read_curve(uninterrupted[0])


@pytest.mark.devices(8)
def test_a_run_moves_to_other_meshes(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    for devices, stop_after in ((8, 3), (1, 8), (8, None)):
        stop, display = StopRequest(), Quiet()
        display.update = lambda row, stop=stop, last=stop_after: (
            stop.set("SIGTERM") if row["step"] == last else None
        )
        train(micro_config(), workdir, devices=jax.devices()[:devices], stop=stop, display=display)
    expected, moved = read_curve(uninterrupted[0]), read_curve(workdir)
    assert [row[:2] for row in moved] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in moved], [row[2] for row in expected], atol=1e-5)


def test_a_finished_run_stays_finished(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    result, messages = run(workdir)
    assert result.step == 12 and result.summary == uninterrupted[1].summary
    assert read_curve(workdir) == read_curve(uninterrupted[0])
    assert "going on from checkpoint 12" in messages[0]


def test_another_configuration_is_refused_field_by_field(uninterrupted) -> None:
    workdir = uninterrupted[0]
    before = (workdir / "config.json").read_bytes()
    changed = micro_config(optimizer__b2=0.9, num_steps=14)
    with pytest.raises(ResumeError) as caught:
        run(workdir, changed)
    text = str(caught.value)
    assert "num_steps: 12 -> 14" in text and "optimizer.b2: 0.95 -> 0.9" in text
    assert "--accept=num_steps,optimizer.b2" in text
    with pytest.raises(ResumeError, match=r"optimizer\.b2: 0\.95 -> 0\.9\. Use"):
        run(workdir, changed, accept=["num_steps"])
    with pytest.raises(UsageError, match=r"optimizer\.b3 cannot be accepted"):
        run(workdir, changed, accept=["num_steps", "optimizer.b3"])
    assert (workdir / "config.json").read_bytes() == before


def test_a_change_accepted_by_name_is_made(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    changed = micro_config(checkpoint__keep_latest=2, guard__spike_window=5)
    result, messages = run(workdir, changed, accept=["guard", "checkpoint.keep_latest"])
    assert result.step == 12 and "accepted change of guard.spike_window: 64 -> 5" in messages
    assert read_curve(workdir) == read_curve(uninterrupted[0])
    run(workdir, changed)


def test_other_data_is_refused(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    values = json.loads((workdir / "config.json").read_text())
    values["data"]["identity"]["train"] |= {"records": 7, "fingerprint": "0" * 64}
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(ResumeError) as caught:
        run(workdir)
    assert "data.identity.train.records: 7 -> 65536; data.identity.train.fingerprint: " in str(caught.value)
    assert str(caught.value).endswith(" --accept=data.identity")
    assert run(workdir, accept=["data.identity.train"])[0].step == 12
    assert run(workdir)[0].step == 12


def test_nothing_is_written_before_everything_fits(tmp_path) -> None:
    for config, error in [
        (micro_config(mesh__fsdp=3), MeshError),
        (micro_config(mesh__data=4), MeshError),
        (micro_config(eval__num_batches=100000), UsageError),
        (micro_config(data__source="prepared", data__paths=(str(tmp_path / "none"),)), UsageError),
        (micro_config(data__source="python"), UsageError),  # 258 bytes and marks do not fit 64 ids
        (micro_config(eval__sample_tokens=5), UsageError),
        (micro_config(eval__heldout_summary=True), UsageError),
    ]:
        with pytest.raises(error):
            run(tmp_path / "run", config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.devices(8)
def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(tmp_path) -> None:
    config = micro_config(global_batch_size=12)
    with pytest.raises(MeshError, match=r"global_batch_size 12 must be a multiple of .* 8 x 1 x 1"):
        train(config, tmp_path / "run", display=Quiet())
    assert list(tmp_path.iterdir()) == []


def test_no_good_checkpoint_is_an_error_never_a_fresh_start(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    for path in (workdir / "checkpoints").iterdir():
        next(path.glob("manifest*")).unlink()
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"up to step 12 but has no good checkpoint \(put aside: 12\.bad-"
        ):
            run(workdir)
    assert read_curve(workdir) == read_curve(uninterrupted[0])
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no good checkpoint \(put aside: none\)"):
        run(workdir)


def test_the_previous_checkpoint_takes_over(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    path = max(
        (workdir / "checkpoints" / "12" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    result, messages = run(workdir)
    assert result.step == 12 and read_curve(workdir) == read_curve(uninterrupted[0])
    assert "checkpoint 12 put aside as" in messages[0] and "has changed" in messages[0]
    assert "going on from checkpoint 8" in messages[1]
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"4", "8", "12", "12.bad-hash"}


def test_a_kill_before_the_first_commit_starts_anew(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "0").mkdir(parents=True)
    shutil.copy(uninterrupted[0] / "config.json", workdir)
    _, messages = run(workdir)
    assert "put aside" in messages[0] and "new run" in messages[1]
    assert read_curve(workdir) == read_curve(uninterrupted[0])


def test_a_lost_config_is_not_replaced_by_another(uninterrupted, tmp_path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has checkpoints but no config\.json with data\.identity"):
        run(workdir, micro_config(optimizer__b1=0.5))
    micro_config().write(workdir)
    with pytest.raises(UsageError, match=r"has checkpoints but no config\.json with data\.identity"):
        run(workdir)


def test_a_run_in_use_is_refused(tmp_path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(LockError):
        run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    lock.close()


def test_a_directory_that_vanishes_is_an_error(tmp_path) -> None:
    display = Quiet()
    display.update = lambda row: shutil.rmtree(tmp_path / "run") if row["step"] == 2 else None
    with pytest.raises(StorageError, match="has vanished"):
        train(micro_config(), tmp_path / "run", devices=jax.devices()[:1], display=display)


def test_an_unwritable_directory_is_an_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        run(tmp_path / "file" / "run")


GUARD = dict(guard__max_nonfinite_steps=2, guard__max_rollbacks=2)


def test_single_non_finite_steps_are_skipped_alone(tmp_path) -> None:
    with child.poison([0, 5]):
        _, messages = run(tmp_path / "run", micro_config(**GUARD))
    curve = read_curve(tmp_path / "run")
    assert [row[0] for row in curve if row[6]] == [1, 6]
    assert all((row[2] is None) == bool(row[6]) for row in curve)
    assert "warning: step 6 (batch 5) was not finite; it was skipped" in messages
    assert read_rollbacks(tmp_path / "run") == []


def test_a_run_of_non_finite_steps_rolls_back_and_replays(tmp_path) -> None:
    config = micro_config(**GUARD)
    with child.poison([5, 6, 9, 10]):
        _, messages = run(tmp_path / "whole", config)
        curve = read_curve(tmp_path / "whole")
        # Steps 6 and 7 failed on batches 5 and 6: back to checkpoint 4, on with batch 7. That reaches
        # batches 9 and 10 at steps 7 and 8: back to 4 once more, on with batch 11.
        assert [row[1] for row in curve] == [0, 1, 2, 3, *range(11, 19)]
        assert [row[0] for row in curve] == list(range(1, 13)) and not any(row[6] for row in curve)
        rollbacks = read_rollbacks(tmp_path / "whole")
        assert [(r.to_step, r.batch, r.at_step) for r in rollbacks] == [(4, 7, 7), (4, 11, 8)]
        assert sum("rollback: 2 non-finite steps in a row" in text for text in messages) == 2
        for stop_after in (5, 6, 9):
            run(tmp_path / "cut", config, stop_after=stop_after)
            run(tmp_path / "cut", config)
            assert read_curve(tmp_path / "cut") == curve
            assert read_rollbacks(tmp_path / "cut") == rollbacks
            shutil.rmtree(tmp_path / "cut")


def test_a_stop_inside_a_run_of_non_finite_steps_changes_nothing(tmp_path) -> None:
    config = micro_config(guard__max_nonfinite_steps=4)
    with child.poison([5, 6, 7, 8]):
        run(tmp_path / "whole", config)
        run(tmp_path / "cut", config, stop_after=7)
        _, messages = run(tmp_path / "cut", config)
    assert read_curve(tmp_path / "cut") == read_curve(tmp_path / "whole")
    assert read_rollbacks(tmp_path / "cut") == read_rollbacks(tmp_path / "whole") != []
    # The checkpoint of the stop lies on the course that was left.
    assert any("put aside" in text and "a rollback has gone back before it" in text for text in messages)


def test_rollbacks_are_bounded(tmp_path) -> None:
    config = micro_config(**GUARD)
    with child.poison(list(range(5, 40))):
        for _ in range(2):
            with pytest.raises(
                DivergedError, match=r"2 rollback\(s\) did not help; lower optimizer.learning_rate"
            ):
                run(tmp_path / "run", config)
    assert len(read_rollbacks(tmp_path / "run")) == 2


def test_a_lost_record_of_rollbacks_is_an_error(tmp_path) -> None:
    with child.poison([5, 6]):
        run(tmp_path / "run", micro_config(**GUARD))
        (tmp_path / "run" / "decisions.jsonl").unlink()
        with pytest.raises(
            CheckpointError, match=r"decisions\.jsonl is missing, but checkpoint 12 went through"
        ):
            run(tmp_path / "run", micro_config(**GUARD))
