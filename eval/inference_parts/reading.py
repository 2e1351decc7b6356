"""Peak memory of reading: each length in a process of its own, so that no other work can hide it.

    python -m eval.inference_parts.reading '{"preset": "holo", ...}'

reads random tokens from the host in pieces and prints one JSON object: the process's peak resident bytes on
a CPU, the allocator's peak on an accelerator. Most of a process is what compiling has left, more or less of
it as its threads found processors; so on a CPU the peak begins anew with reading, and what that adds counts.
The allocator has one arena there: by default threads have their own, which come and go by 3% of the process.
It costs a quarter of the rate. And it returns what is freed from a fixed size on: by default that size grows
to what was freed, and arrays then lie between holes, up to 3% of the process in a longer reading.
On an accelerator the peak is since the process began, with what products are tuned on while programs compile:
a cache of programs would spare all processes but the first that memory, so there is none.
"""

import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
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
_LIMIT = 0.02


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
    found: dict[tuple[str, int], dict[str, float]] = {}
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
        found[model, length] = measured
        say(f"{model} read {length:,} tokens: {measured}")
        for metric, value in measured.items():
            reporter.add(exact(metric, value, **where))
        reporter.save()
    least, most = min(lengths), max(lengths)
    if "holo" in models and all(("holo", length) in found for length in lengths):
        ratio = _ratio(found["holo", least], found["holo", most])
        where = {"part": "reading", "model": "holo", "tokens": most}
        if ratio is None:
            reporter.note(
                "this system does not say what reading adds to a process: its memory is not compared"
            )
            return
        reporter.add(exact("peak_ratio", ratio, detail=f"over {least:,} tokens", **where))
        if abs(ratio - 1) > _LIMIT:
            reporter.fail_control(f"reading {most:,} tokens takes {ratio:.3f} of the memory of {least:,}")


def _ratio(least: dict[str, float], most: dict[str, float]) -> float | None:
    """Memory of the longest reading over that of the shortest; None where that cannot be told."""
    if jax.default_backend() != "cpu":
        return most["peak_bytes"] / least["peak_bytes"]
    if "added_bytes" not in least:
        return None
    return 1 + (most["added_bytes"] - least["added_bytes"]) / least["peak_bytes"]


def _in_a_process(request: dict[str, Any]) -> dict[str, float]:
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if jax.default_backend() == "cpu":
        environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
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
    """Reads ``length`` random tokens in this process: peak bytes, tokens a second, bytes of the state.

    On Linux without an accelerator also ``added_bytes``: by how much the peak while reading is above what the
    process held before.
    """
    config = model_config(model, Size(layers, width, vocab), precision=Precision(storage=activations))
    network = jax.jit(lambda: HoloForCausalLM(config, rngs=nnx.Rngs(seed)))()
    tokens = np.random.default_rng(seed).integers(0, vocab, (1, length), np.int32)
    # With the cache of the whole length, so that attention's program is the one that is timed.
    jax.block_until_ready(prefill(network, tokens[:, :piece], piece_size=piece, cache_length=length))
    before = _peak_from_now()
    start = time.perf_counter()
    reading = jax.block_until_ready(prefill(network, tokens, piece_size=piece))
    seconds = time.perf_counter() - start
    measured = {"tokens_per_second": length / seconds, "state_bytes": float(state_bytes(reading.state))}
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        return measured | {"peak_bytes": statistics["peak_bytes_in_use"]}
    if before is None:
        return measured | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    peak = _status("VmHWM")
    return measured | {"peak_bytes": peak, "added_bytes": peak - before}


def _peak_from_now() -> int | None:
    """Lets this process's peak of resident bytes begin anew and returns what is resident; None off Linux."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
