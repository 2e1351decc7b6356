"""The end of a run: held-out bits per byte beside gzip and xz, the loss curve, a sample, what is next."""

import json
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from holo_jax.generate import Sampling, generate
from holo_jax.model import count_parameters
from train.corpus.dataset import Document
from train.evaluate import bits_per_byte, compressor_bits_per_byte
from train.inputs import Inputs
from train.metrics import METRICS_FILE, iterate_rows
from train.model_functions import ModelFunctions, Params
from train.plots import LOSS_FILE, plot_loss
from train.run_config import RunConfig
from train.sharding import batch_sharding, replicated
from train.step import StepFunctions

SUMMARY_FILE = "summary.json"

_LINES = {
    "more text": "python -m eval.generate --run={workdir} --prompt {prompt}",
    "train more": "python -m train.main --config=configs/{name}.py"
    " --config.num_steps={steps} --workdir={longer}",
    "own text": "python -m train.prepare --help",
}


def summarize(
    config: RunConfig,
    workdir: Path,
    inputs: Inputs,
    functions: ModelFunctions,
    steps: StepFunctions,
    mesh: Mesh,
    params: Params,
    say: Callable[[str], None],
    primary: bool = True,
) -> dict[str, Any]:
    """Writes ``summary.json`` and ``loss.png`` and tells the outcome.

    Of several processes all take part in what is computed from divided parameters; the rest is left to the
    ``primary`` one.

    Returns:
      Empty but in the primary process. There what ``summary.json`` holds: ``params``, ``steps``, ``tokens``,
      ``loss`` (mean of the last steps), ``heldout_loss`` (nats per token, last evaluation),
      ``tokens_per_second`` (of the median step), and with ``config.eval.heldout_summary``
      ``heldout_bits_per_byte``, ``gzip_bits_per_byte``, ``xz_bits_per_byte``, ``heldout_bytes``.
    """
    bits, documents = None, []
    if config.eval.heldout_summary:
        documents = list(inputs.heldout_documents())
        bits = _heldout_bits(config, inputs, steps, mesh, params, documents)
    whole = _gather(params, mesh, primary) if config.eval.sample_tokens else None
    if not primary:
        return {}
    rows = list(iterate_rows(workdir / METRICS_FILE))
    losses = [row["loss"] for row in rows[-50:] if row["loss"] is not None]
    evaluated = [row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None]
    summary: dict[str, Any] = {
        "params": count_parameters(params),
        "steps": config.num_steps,
        "tokens": config.num_steps * config.tokens_per_step,
        "loss": statistics.fmean(losses) if losses else None,
        "heldout_loss": evaluated[-1] if evaluated else None,
        "tokens_per_second": _tokens_per_second(config, rows),
    }
    if bits is not None:
        summary |= {
            "heldout_bits_per_byte": bits,
            **compressor_bits_per_byte(documents),
            "heldout_bytes": sum(document.text_bytes for document in documents),
        }
        say(
            f"held out: {summary['heldout_bits_per_byte']:.3f} bits per byte "
            f"(gzip -9: {summary['gzip_bits_per_byte']:.3f}, xz -9: {summary['xz_bits_per_byte']:.3f}) "
            f"on {summary['heldout_bytes']:,} bytes"
        )
    plot_loss(rows, workdir / LOSS_FILE, f"{config.name}: {summary['params']:,} parameters")
    part = (workdir / SUMMARY_FILE).with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2) + "\n")
    part.replace(workdir / SUMMARY_FILE)
    if config.eval.sample_tokens:
        say(f"sample:\n{_sample(config, inputs, functions, whole)}")
    say(f"in {workdir}: {SUMMARY_FILE}, {LOSS_FILE}, {METRICS_FILE}, config.json, checkpoints/, tensorboard/")
    say(_next_commands(config, workdir, inputs))
    return summary


def _next_commands(config: RunConfig, workdir: Path, inputs: Inputs) -> str:
    """What can be run next, a line each; text only where a tokenizer makes it."""
    lines = dict(_LINES)
    if inputs.tokenizer is None:
        del lines["more text"]
    values = {
        "workdir": shlex.quote(str(workdir)),
        "longer": shlex.quote(f"{workdir}-longer"),
        "prompt": shlex.quote(config.eval.sample_prompt),
        "name": config.name,
        "steps": 3 * config.num_steps,
    }
    return "next:\n" + "\n".join(f"  {title:<12} {line.format(**values)}" for title, line in lines.items())


def _heldout_bits(
    config: RunConfig,
    inputs: Inputs,
    steps: StepFunctions,
    mesh: Mesh,
    params: Params,
    documents: list[Document],
) -> float:
    return bits_per_byte(
        steps.evaluate,
        params,
        documents,
        inputs.heldout.context_length,
        config.eval.global_batch_size,
        batch_sharding(mesh),
    )


def _gather(params: Params, mesh: Mesh, primary: bool) -> Params:
    """All parameters in the primary process's memory, sent one at a time; None in the others."""
    if jax.process_count() == 1:
        return jax.device_get(params)
    send = jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))

    def one(leaf: jax.Array) -> np.ndarray | None:
        sent = send(leaf)
        return np.asarray(sent) if primary else None

    return jax.tree.map(one, params)


def _tokens_per_second(config: RunConfig, rows: list[dict[str, Any]]) -> float | None:
    seconds = [row["seconds"] for row in rows if row["seconds"] > 0]
    return round(config.tokens_per_step / statistics.median(seconds), 1) if seconds else None


def _sample(config: RunConfig, inputs: Inputs, functions: ModelFunctions, params: Params) -> str:
    tokenizer = inputs.tokenizer
    assert tokenizer is not None  # open_inputs checks it
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = [*begin, *tokenizer.encode(config.eval.sample_prompt)]
    generated = generate(
        functions.model(params),
        [prompt],
        max_new_tokens=config.eval.sample_tokens,
        sampling=Sampling(temperature=config.eval.sample_temperature),
        seeds=config.seed,
        allowed_tokens=tokenizer.vocab_size,
    )
    return tokenizer.decode([*prompt, *generated.tokens[0]])
