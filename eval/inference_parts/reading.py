"""Peak memory of reading: each length in a process of its own, so that no other work can hide it.

    python -m eval.inference_parts.reading '{"preset": "holo", ...}'

reads random tokens from the host in pieces and prints one JSON object: the process's peak resident bytes on
a CPU, the allocator's peak on an accelerator.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.models import Size, model_config
from eval.speed_parts.timing import say
from holo_jax.generate import prefill, state_bytes
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import Precision

_TIMEOUT = 900


def run(
    reporter: Reporter, size: Size, activations: str, lengths: Sequence[int], piece: int, seed: int
) -> None:
    """Reads each length with ``holo``; reports peaks and rates."""
    peaks = {}
    for length in lengths:
        where = {"part": "reading", "model": "holo", "tokens": length}
        request = dataclasses.asdict(size) | {
            "activations": activations,
            "length": length,
            "piece": piece,
            "seed": seed,
        }
        try:
            measured = _in_a_process(request)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            reporter.add(absent("peak_bytes", "failed", detail=str(error)[-300:], **where))
            continue
        peaks[length] = measured["peak_bytes"]
        say(f"read {length:,} tokens: {measured}")
        for metric, value in measured.items():
            reporter.add(exact(metric, value, **where))
    if len(peaks) == len(lengths):
        first, last = peaks[min(peaks)], peaks[max(peaks)]
        where = {"part": "reading", "model": "holo", "tokens": max(peaks)}
        reporter.add(exact("peak_ratio", last / first, detail=f"over {min(peaks):,} tokens", **where))
        if abs(last / first - 1) > 0.02:
            reporter.fail_control(
                f"reading {max(peaks):,} tokens takes {last / first:.3f} of the memory of {min(peaks):,}"
            )


def _in_a_process(request: dict[str, Any]) -> dict[str, float]:
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "eval.inference_parts.reading", json.dumps(request)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    *, layers: int, width: int, vocab: int, activations: str, length: int, piece: int, seed: int
) -> dict[str, float]:
    """Reads ``length`` random tokens in this process: peak bytes, tokens a second, bytes of the state."""
    config = model_config("holo", Size(layers, width, vocab), precision=Precision(storage=activations))
    model = jax.jit(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(seed)))()
    tokens = np.random.default_rng(seed).integers(0, vocab, (1, length), np.int32)
    jax.block_until_ready(prefill(model, tokens[:, :piece], piece_size=piece))
    start = time.perf_counter()
    reading = jax.block_until_ready(prefill(model, tokens, piece_size=piece))
    seconds = time.perf_counter() - start
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        peak = statistics["peak_bytes_in_use"]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_bytes": peak,
        "tokens_per_second": length / seconds,
        "state_bytes": state_bytes(reading.state),
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
