"""Run directories as the trainer leaves them, with a micro model that was never trained."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from holo_jax.config import HoloConfig
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import FULL
from tests.holo_jax.models import build
from train.checkpoint import CheckpointStore
from train.run_config import CheckpointConfig
from train.step import TrainState

SIZES = dict(vocab_size=258, hidden_size=16, hd_dim=16, head_dim=8, phasors=6, num_hidden_layers=2)


def write_run(
    directory: Path, *, preset: str = "holo", data: dict | None = None, steps: tuple[int, ...] = (3,)
) -> HoloForCausalLM:
    """Writes ``config.json`` and a checkpoint a step; returns the model of the last."""
    config = HoloConfig.preset(preset, precision=FULL, **SIZES)
    settings = {"model": config.to_dict(), "data": data or {"source": "python"}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings))
    keep = CheckpointConfig(every_steps=1, keep_latest=9, keep_best=0, keep_every_steps=0)
    store = CheckpointStore(directory / "checkpoints", keep)
    for step in steps:
        model = build(config, seed=step)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        state = TrainState(
            step=jnp.int32(step),
            params=params,
            opt_state=optax.adam(1e-3).init(params),
            rng=jax.random.key_data(jax.random.key(0, impl="threefry2x32")),
            skipped=jnp.int32(0),
            nonfinite_run=jnp.int32(0),
        )
        store.save(step, state, {"rollbacks": []})
    store.close()
    return model
