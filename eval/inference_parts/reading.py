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
from eval.speed_parts.timing import failure, say
from holo_jax.generate import prefill, state_bytes
from holo_jax.model import HoloForCausalLM
from holo_jax.precision import Precision

_TIMEOUT = 900
# Of a device's memory; and of a process on a CPU, most of which is what compiling took, more or less of it as
# its threads found processors (428 to 475 MB for the same tokens).
LIMITS = (0.02, 0.25)


def run(
    reporter: Reporter,
    size: Size,
    activations: str,
    lengths: Sequence[int],
    piece: int,
    seed: int,
    models: Sequence[str] = ("holo",),
) -> None:
    """Reads each length with each model; reports peaks and rates, and checks that those of ``holo`` agree."""
    peaks = {}
    for model, length in ((model, length) for model in models for length in lengths):
        where = {"part": "reading", "model": model, "tokens": length}
        request = dataclasses.asdict(size) | {
            "model": model,
            "activations": activations,
            "length": length,
            "piece": piece,
            "seed": seed,
        }
        try:
            measured = _in_a_process(request)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            status, detail = failure(error)
            reporter.add(absent("peak_bytes", status, detail=detail, **where))
            continue
        peaks[model, length] = measured["peak_bytes"]
        say(f"{model} read {length:,} tokens: {measured}")
        for metric, value in measured.items():
            reporter.add(exact(metric, value, **where))
        reporter.save()
    least, most = min(lengths), max(lengths)
    if "holo" in models and all(("holo", length) in peaks for length in lengths):
        ratio = peaks["holo", most] / peaks["holo", least]
        where = {"part": "reading", "model": "holo", "tokens": most}
        reporter.add(exact("peak_ratio", ratio, detail=f"over {least:,} tokens", **where))
        if abs(ratio - 1) > LIMITS[jax.default_backend() == "cpu"]:
            reporter.fail_control(f"reading {most:,} tokens takes {ratio:.3f} of the memory of {least:,}")


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
    *,
    layers: int,
    width: int,
    vocab: int,
    activations: str,
    length: int,
    piece: int,
    seed: int,
    model: str = "holo",
) -> dict[str, float]:
    """Reads ``length`` random tokens in this process: peak bytes, tokens a second, bytes of the state."""
    config = model_config(model, Size(layers, width, vocab), precision=Precision(storage=activations))
    network = jax.jit(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(seed)))()
    tokens = np.random.default_rng(seed).integers(0, vocab, (1, length), np.int32)
    # With the cache of the whole length, so that attention's program is the one that is timed.
    jax.block_until_ready(prefill(network, tokens[:, :piece], piece_size=piece, cache_length=length))
    start = time.perf_counter()
    reading = jax.block_until_ready(prefill(network, tokens, piece_size=piece))
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
