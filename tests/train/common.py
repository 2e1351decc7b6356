"""A micro run for the tests: small enough to compile in seconds, whole enough to be a real run."""

import json
from pathlib import Path
from typing import Any

from configs import base
from train.metrics import METRICS_FILE
from train.progress import ProgressDisplay
from train.run_config import RunConfig

CURVE = ("step", "batch", "loss", "grad_norm", "learning_rate", "num_targets", "skipped")


def micro_config(**overrides: Any) -> RunConfig:
    """One layer of the preset that compiles fastest, on random tokens; ``a__b=v`` overrides field a.b."""
    config = base.get_config()
    config.name = "micro"
    config.num_steps = 12
    config.global_batch_size = 8
    config.context_length = 16
    config.data.source = "random"
    config.model.preset = "seed"
    config.model.vocab_size = 64
    config.model.hidden_size = 16
    config.model.hd_dim = 16
    config.model.head_dim = 8
    config.model.phasors = 4
    config.model.num_hidden_layers = 1
    config.model.precision.storage = "float32"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.eval.every_steps = 6
    config.eval.num_batches = 1
    config.eval.global_batch_size = 8
    config.checkpoint.every_steps = 4
    config.log.tensorboard = False
    config.watchdog.startup_seconds = 0.0
    config.watchdog.step_seconds = 0.0
    config.watchdog.save_seconds = 0.0
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return RunConfig.from_dict(config.to_dict())


def read_curve(workdir: Path) -> list[tuple[Any, ...]]:
    """The rows of a run as exact values, without timings; every line of the file must be whole."""
    lines = (workdir / METRICS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(*(row[name] for name in CURVE), row.get("heldout_loss")) for row in rows]


class Quiet(ProgressDisplay):
    """Keeps the messages for the test to read."""

    def __init__(self) -> None:
        with open("/dev/null", "w") as nowhere:
            super().__init__(1, 1, 1, nowhere)
        self.messages: list[str] = []

    def update(self, row: Any) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)
