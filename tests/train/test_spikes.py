"""Spike warnings: none on a normal curve, one at the begin and one at the end of a spike."""

import numpy as np

from tests.train.common import micro_config
from train.spikes import SpikeDetector


def warnings(losses: list[float], **guard: float) -> list[tuple[int, str]]:
    config = micro_config(**{f"guard__{name}": value for name, value in guard.items()}).guard
    detector = SpikeDetector(config)
    found = [(step, detector.observe(step, step + 100, loss)) for step, loss in enumerate(losses, start=1)]
    return [(step, text) for step, text in found if text]


def normal(count: int, level: float = 3.0) -> list[float]:
    return list(level + 0.05 * np.random.default_rng(0).standard_normal(count))


def test_silence_on_a_normal_curve() -> None:
    falling = list(np.linspace(5, 3, 200) + 0.05 * np.random.default_rng(1).standard_normal(200))
    assert warnings(falling) == []


def test_a_spike_is_named_with_steps_and_batches() -> None:
    found = warnings([*normal(50), 6.0, 7.0, 6.5, *normal(20)])
    assert [step for step, _ in found] == [51, 54]
    assert "begins at step 51 (batch 151): 6.0000" in found[0][1]
    assert "steps 51 to 53 (batches 151 to 153) is over; peak 7.0000" in found[1][1]


def test_a_spike_does_not_poison_what_is_normal() -> None:
    found = warnings([*normal(50), *[6.0] * 30, *normal(10), 6.0, 3.0])
    assert [step for step, _ in found] == [51, 81, 91, 92]


def test_a_lasting_change_becomes_normal() -> None:
    found = warnings([*normal(50), *normal(100, 9.0)], spike_window=32)
    assert [step for step, _ in found] == [51, 82]


def test_non_finite_losses_are_not_taken_in() -> None:
    assert warnings([*normal(20), float("nan"), float("inf"), *normal(20)]) == []


def test_off() -> None:
    assert warnings([*normal(50), 100.0], spike_window=0) == []
