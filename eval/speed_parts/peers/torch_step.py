"""One PyTorch peer's train step in this process: forward, loss, backward, clipping, fused AdamW.

    python -m eval.speed_parts.peers.torch_step '{"model": "llama", "length": 2048, ...}'

compiles and warms up under the locks ``locks`` and prints "ready"; for each line on standard input, such as
``{"samples": 3, "seconds": 0.1}``, it trains on and prints one JSON object. Products run in bfloat16 by
autocast over float32 parameters, as in ours.
"""

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.speed_parts.peers.torch_models import FLA_MODELS, build, product_parameters
from eval.speed_parts.peers.tuning import compile_candidates_together

_ATTENTION = {"llama": SDPBackend.FLASH_ATTENTION, "llama_cudnn": SDPBackend.CUDNN_ATTENTION}


def make_step(model: Any, device: str, compiled: str) -> Any:
    """(tokens [b, t]) -> loss, after one update; ``compiled``: "all", "loss" (after the blocks) or "none"."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def loss_of_hidden(hidden: Tensor, tokens: Tensor) -> Tensor:
        # The last position has no target; logits are not cut, which would copy them.
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(model.head(hidden).float().flatten(0, 1), targets.flatten())

    if compiled == "loss":
        loss_of_hidden = torch.compile(loss_of_hidden, dynamic=False)

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss_of_hidden(model(tokens), tokens)

    evaluate = torch.compile(loss_of, dynamic=False) if compiled == "all" else loss_of

    def step(tokens: Tensor) -> Tensor:
        loss = evaluate(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class Training:
    """A peer's training in this process, compiled by its first step."""

    def __init__(
        self,
        *,
        model: str,
        length: int,
        batch: int,
        layers: int,
        width: int,
        vocab: int,
        compiled: str,
        locks: Sequence[str] = (),
    ) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self._net = build(model, layers=layers, width=width, vocab=vocab, length=length).to(self._device)
        self._step = make_step(self._net, self._device, compiled)
        self._inputs = [torch.randint(0, vocab, (batch, length), device=self._device) for _ in range(4)]
        self._backend = _ATTENTION.get(model) if self._device == "cuda" else None
        with contextlib.ExitStack() as stack:
            for lock in locks:  # in one order everywhere, so that none waits for another in a circle
                fcntl.flock(stack.enter_context(open(lock)), fcntl.LOCK_EX)
            stack.enter_context(self._attention())
            start = time.perf_counter()
            self._step(self._inputs[0])
            self._wait()
            self._compile_seconds = time.perf_counter() - start
            self._release()

    def _attention(self) -> Any:
        return contextlib.nullcontext() if self._backend is None else sdpa_kernel(self._backend)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _release(self) -> None:
        """Leaves the device memory of activations to others."""
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def measure(self, samples: int, seconds: float) -> dict[str, Any]:
        """Seconds of a step (``samples`` of them, each over about ``seconds``), peak bytes of the device."""
        with self._attention():
            for tokens in self._inputs[1:3]:
                self._step(tokens)
            self._wait()
            if self._device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            self._step(self._inputs[3])
            self._wait()
            calls = max(1, round(seconds / (time.perf_counter() - start)))
            measured = []
            for _ in range(samples):
                start = time.perf_counter()
                for call in range(calls):
                    loss = self._step(self._inputs[call % 4])
                self._wait()
                measured.append((time.perf_counter() - start) / calls)
        found = {
            "seconds": measured,
            "compile_seconds": self._compile_seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if self._device == "cuda" else None,
            "product_parameters": product_parameters(self._net),
            "last_loss": float(loss),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self._device == "cuda" else "cpu",
        }
        self._release()
        return found


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if request["model"] in FLA_MODELS:
        compile_candidates_together()
    try:
        training = Training(**request)
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(training.measure(**json.loads(line))), flush=True)
    except torch.OutOfMemoryError as error:
        print(json.dumps({"status": "oom", "detail": str(error).splitlines()[0]}), flush=True)
