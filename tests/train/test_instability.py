"""Early instability: 24 layers at ten times the default learning rate stay finite and still learn."""

import json
import math

import jax
import pytest

from configs import base
from tests.train import child
from tests.train.common import micro_config
from train.checkpoint import CheckpointStore
from train.loop import build
from train.sharding import make_mesh

pytestmark = pytest.mark.slow


def test_a_deep_model_at_ten_times_the_learning_rate(tmp_path) -> None:
    config = micro_config(
        global_batch_size=4,
        model__num_hidden_layers=24,
        model__vocab_size=258,
        data__source="python",
        optimizer__learning_rate=10 * base.get_config().optimizer.learning_rate,
        optimizer__warmup_steps=0,
        num_steps=200,
        eval__every_steps=0,
        checkpoint__every_steps=100,
    )
    run = tmp_path / "run"
    run.mkdir()
    config.write(run)
    # In a process of its own, as 200 steps are long enough to want optimised programs.
    process = child.start_command([f"--resume={run}"], run.with_suffix(".log"), devices=1, level=1)
    process.join()
    assert process.exitcode == 0, child.output(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    # The guards' part: whatever the gradients did, no update and no checkpoint is non-finite.
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    _, steps = build(config.model, config.optimizer, config.num_steps, mesh)
    store = CheckpointStore(run / "checkpoints", config.checkpoint)
    for step in store.candidates():
        params = store.restore(step, steps.shapes, steps.shardings).state.params
        assert all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)), step
    store.close()
    skipped = sum(row["skipped"] for row in rows)
    last = [row["loss"] for row in rows[-20:] if row["loss"] is not None]
    assert skipped == 0 and max(row["grad_norm"] for row in rows) < 100
    assert sum(last) / len(last) < rows[0]["loss"] - 1 < math.log(258)
