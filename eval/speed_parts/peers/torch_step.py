"""One PyTorch peer's train step in this process: forward, loss, backward, clipping, fused AdamW.

    python -m eval.speed_parts.peers.torch_step '{"model": "llama", "length": 2048, ...}'

compiles and warms up under the lock ``lock``, prints "ready", waits for a line on standard input (or its
end), and prints one JSON object. Products run in bfloat16 by autocast over float32 parameters, as in ours.
"""

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.speed_parts.peers.torch_models import build, product_parameters

_ATTENTION = {"llama": SDPBackend.FLASH_ATTENTION, "llama_cudnn": SDPBackend.CUDNN_ATTENTION}


def make_step(model: Any, device: str, compiled: bool) -> Any:
    """(tokens [b, t]) -> loss, after one update of the model."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model.head(model(tokens))
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())

    evaluate = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(tokens: Tensor) -> Tensor:
        loss = evaluate(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(
    *,
    model: str,
    length: int,
    batch: int,
    layers: int,
    width: int,
    vocab: int,
    samples: int,
    seconds: float,
    compiled: bool,
    lock: str = "/dev/null",
    ready: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds of a step (``samples`` of them, each over about ``seconds``) and peak bytes of the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = build(model, layers=layers, width=width, vocab=vocab).to(device)
    step = make_step(net, device, compiled)
    inputs = [torch.randint(0, vocab, (batch, length), device=device) for _ in range(4)]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    backend = _ATTENTION.get(model) if device == "cuda" else None
    only = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
    with only:
        with open(lock) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            start = time.perf_counter()
            step(inputs[0])
            wait()
            compile_seconds = time.perf_counter() - start
            if device == "cuda":
                torch.cuda.empty_cache()
        ready()
        for tokens in inputs[1:3]:
            step(tokens)
        wait()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(inputs[3])
        wait()
        calls = max(1, round(seconds / (time.perf_counter() - start)))
        measured = []
        for _ in range(samples):
            start = time.perf_counter()
            for call in range(calls):
                loss = step(inputs[call % 4])
            wait()
            measured.append((time.perf_counter() - start) / calls)
    return {
        "seconds": measured,
        "compile_seconds": compile_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "product_parameters": product_parameters(net),
        "last_loss": float(loss),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def _wait_for_turn() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    try:
        print(json.dumps(measure(**json.loads(sys.argv[1]), ready=_wait_for_turn)))
    except torch.OutOfMemoryError as error:
        print(json.dumps({"status": "oom", "detail": str(error).splitlines()[0]}))
