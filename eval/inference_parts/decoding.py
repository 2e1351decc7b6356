"""Latency and rate of decoding: ``decode_block`` on states as they are after a context of a given length."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.common import Reporter
from eval.results import Scalar, absent, exact
from eval.speed_parts.floors import Ceilings
from eval.speed_parts.models import Size, model_config
from eval.speed_parts.timing import Built, Job, compile_all, failure, median, missing, say
from holo_jax.array_types import Array
from holo_jax.generate import Sampling, decoding_form, init_state, prefill, state_bytes
from holo_jax.generate.decoding import NONE, Decoding, DecodingInputs, block_of, loop_state
from holo_jax.generate.pending import GROUP, Held
from holo_jax.generate.stepping import Form, choose, pack
from holo_jax.mixers import AttentionState
from holo_jax.model import HoloForCausalLM, ModelState
from holo_jax.precision import Precision

_PLAN = Sampling().plan
_METRICS = ("milliseconds_per_step", "tokens_per_second", "share_of_bound", "share_of_traffic")
# Of the allocator's limit; the rest is for logits, temporaries and the library's own.
_USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program: a model, how its state is stored, rows, tokens before it (0: any), tokens a call."""

    model: str
    width: int
    state_dtype: str
    batch: int
    context: int
    steps: int

    @property
    def where(self) -> dict[str, Scalar]:
        """Its settings in results."""
        return {"part": "decoding", **dataclasses.asdict(self)}


class Decoder:
    """A model of random parameters in decoding form."""

    def __init__(self, name: str, size: Size, activations: str, seed: int) -> None:
        self.config = model_config(name, size, precision=Precision(storage=activations))
        make = jax.jit(lambda: decoding_form(HoloForCausalLM(self.config, rngs=nnx.Rngs(seed))))
        self.graphdef, self.params = nnx.split(make(), nnx.Param)
        # Of an untied embedding only the rows of the tokens are read.
        table = 0 if self.config.tie_embeddings else self.params["model"]["embedding"][...].nbytes
        self.weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) - table

    @property
    def model(self) -> HoloForCausalLM:
        """The module."""
        return nnx.merge(self.graphdef, self.params)

    def inputs(self, batch: int) -> DecodingInputs:
        """Sampling from the model's own distribution, no stop token."""
        seeds = jnp.arange(batch, dtype=jnp.uint32)
        allowed = jnp.int32(self.config.vocab_size)
        return DecodingInputs(Sampling().numbers, seeds, jnp.full((4,), NONE, jnp.int32), allowed)

    def start(self, cell: Cell, spare: int) -> Decoding:
        """As after ``cell.context`` tokens, with room for ``spare`` more."""
        state = init_state(
            self.config, cell.batch, cache_length=cell.context + spare, state_dtype=cell.state_dtype
        )
        return self.decoding(_filled(self.loop_state(state), cell.context))

    def form(self, batch: int) -> Form:
        """How tokens of a batch are read."""
        return choose(self.config, batch)

    def loop_state(self, state: ModelState) -> ModelState:
        """The state as the loop carries it."""
        return loop_state(self.config, state, self.form(state.position.shape[0]))

    def packed(self, batch: int) -> Any:
        """The weights once more, where the form of this batch wants them stacked."""
        return pack(self.model, self.form(batch))

    def decoding(self, state: ModelState) -> Decoding:
        """What the loop carries, far from its end."""
        batch = state.position.shape[0]
        logits = jnp.zeros((batch, self.config.vocab_size), jnp.float32)
        return Decoding(logits, state, jnp.full((batch,), 2**30, jnp.int32), None)

    def job(self, cell: Cell, spare: int) -> Job:
        """Lowers the program of a cell, without its arrays."""
        shapes = jax.eval_shape(lambda: (self.start(cell, spare), self.inputs(cell.batch)))

        def lower() -> Any:
            options = dict(steps=cell.steps, plan=_PLAN, form=self.form(cell.batch))
            packed = jax.eval_shape(lambda: self.packed(cell.batch))
            return block_of(self.form(cell.batch)).lower(
                self.graphdef, self.params, *shapes, packed, **options
            )

        return Job(cell.where, lower)


def _filled(state: ModelState, context: int) -> ModelState:
    """The state with caches that hold ``context`` tokens (of zeros: their values cost no time)."""

    def fill(mixer: Any) -> Any:
        if not isinstance(mixer, AttentionState):
            return mixer
        slots = jnp.broadcast_to(jnp.arange(mixer.times.shape[1], dtype=jnp.int32)[None], mixer.times.shape)
        return mixer._replace(
            times=jnp.where(slots < context, slots, -1),
            segment_ids=jnp.ones_like(mixer.segment_ids),
            index=jnp.full_like(mixer.index, context),
        )

    layers = jax.tree.map(fill, state.layers, is_leaf=lambda node: isinstance(node, AttentionState))
    return state._replace(layers=layers, position=jnp.full_like(state.position, context))


def plan(
    decoders: Sequence[str],
    size: Size,
    *,
    activations: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    single_steps: bool,
    seed: int,
) -> list[tuple[Decoder, Cell]]:
    """Every decoder at every batch (and context, for attention), with its weights on the device."""
    planned = []
    for name in dict.fromkeys(text.partition(":")[0] for text in decoders):
        decoder = Decoder(name, size, activations, seed)
        dtypes = [text.partition(":")[2] or "float32" for text in decoders if text.partition(":")[0] == name]
        lengths = contexts if "attention" in decoder.config.layer_kinds else (0,)
        cells = [Cell(name, size.width, d, b, c, steps) for d in dtypes for c in lengths for b in batches]
        if single_steps:
            cells.append(Cell(name, size.width, dtypes[0], min(batches), lengths[0], 1))
        planned += [(decoder, cell) for cell in cells]
    return planned


def run(
    reporter: Reporter,
    planned: Sequence[tuple[Decoder, Cell]],
    *,
    samples: int,
    ceilings: Ceilings,
    workers: int,
) -> None:
    """Compiles what fits the device, all together; then times one after the other."""

    def spare(cell: Cell) -> int:
        return cell.steps * (samples + 2)

    fitting = [(d, cell) for d, cell in planned if _fits(reporter, d, cell, spare(cell))]
    jobs = [decoder.job(cell, spare(cell)) for decoder, cell in fitting]
    for (decoder, cell), built in zip(fitting, compile_all(jobs, workers), strict=True):
        _time(reporter, decoder, cell, built, spare(cell), samples, ceilings)
        reporter.save()


def _fits(reporter: Reporter, decoder: Decoder, cell: Cell, spare: int) -> bool:
    statistics = jax.devices()[0].memory_stats()
    shapes = jax.eval_shape(lambda: decoder.start(cell, spare))
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    if not statistics or statistics["bytes_in_use"] + state < _USABLE * statistics["bytes_limit"]:
        return True
    limit = statistics["bytes_limit"]
    detail = f"the state needs {state / 2**30:.0f} GiB beside weights; the device has {limit / 2**30:.0f} GiB"
    reporter.add(*(absent(metric, "oom", detail=detail, **cell.where) for metric in _METRICS))
    return False


def _time(
    reporter: Reporter,
    decoder: Decoder,
    cell: Cell,
    built: Built,
    spare: int,
    samples: int,
    ceilings: Ceilings,
) -> None:
    if built.status != "ok":
        reporter.add(*missing(_METRICS, built, "compile"))
        return
    try:
        decoding = jax.block_until_ready(jax.jit(lambda: decoder.start(cell, spare))())
        size = state_bytes(decoding.state)
        start = _blocks(decoder, built.program, decoding, cell.batch)
        several = cell.steps > 1
        seconds = _ahead(start, cell.steps, samples) if several else _samples([start], 1, samples)[0]
    except Exception as error:
        status, detail = failure(error)
        reporter.add(*(absent(metric, status, detail=detail, **cell.where) for metric in _METRICS))
        return
    bound = (decoder.weight_bytes + size) / ceilings.bytes_per_second
    moved = (decoder.weight_bytes + _moved(decoder, decoding.state)) / ceilings.bytes_per_second
    reporter.add(
        median("milliseconds_per_step", seconds, cell.where, scale=1e3),
        median("tokens_per_second", [cell.batch / s for s in seconds], cell.where),
        median("share_of_bound", [bound / s for s in seconds], cell.where),
        median("share_of_traffic", [moved / s for s in seconds], cell.where),
        exact("state_bytes", size, **cell.where),
        exact("weight_bytes", decoder.weight_bytes, **cell.where),
    )
    took = np.median(seconds)
    shares = f"{bound / took:.2f} of the bound, {moved / took:.2f} of the traffic"
    say(f"{cell.where}: {1e3 * took:.3f} ms a step, {shares}")


def _moved(decoder: Decoder, state: ModelState) -> float:
    """Bytes of the state that the way it is decoded reads and writes a token.

    Where writes are held back the memory is read once a token without its residue, and both are read and
    written once a group. Another memory is read and written back with every token; of a cache, one slot is.
    """
    held = [
        node
        for node in jax.tree.leaves(state.layers, is_leaf=lambda node: isinstance(node, Held))
        if isinstance(node, Held)
    ]
    if held:
        memory = sum(node.memory.nbytes for node in held)
        other = state_bytes(state) - sum(node.memory.nbytes + node.residue.nbytes for node in held)
        return memory * (1 + 4 / GROUP) + other
    return state_bytes(state) * (1 if "attention" in decoder.config.layer_kinds else 2)


def latency(
    reporter: Reporter,
    size: Size,
    activations: str,
    contexts: Sequence[int],
    *,
    piece: int,
    steps: int,
    samples: int,
    seed: int,
) -> None:
    """Decoding after reading few and many tokens, in turns; fails as a control above 3% of difference."""
    decoder = Decoder("holo", size, activations, seed)
    tokens = np.random.default_rng(seed).integers(0, size.vocab, max(contexts), np.int32)
    shapes = jax.eval_shape(lambda: decoder.start(Cell("holo", size.width, "float32", 1, 0, steps), steps))
    program = (
        block_of(decoder.form(1))
        .lower(
            decoder.graphdef,
            decoder.params,
            shapes,
            decoder.inputs(1),
            decoder.packed(1),
            steps=steps,
            plan=_PLAN,
            form=decoder.form(1),
        )
        .compile()
    )
    runs = []
    for context in contexts:
        reading = prefill(decoder.model, [tokens[:context]], piece_size=piece)
        runs.append(_blocks(decoder, program, decoder.decoding(decoder.loop_state(reading.state)), 1))
    # Many short samples in turns: what else the machine does meets all contexts alike.
    measured = _samples(runs, steps, 4 * samples)
    for context, seconds in zip(contexts, measured, strict=True):
        where = {"part": "latency", "model": "holo", "context": context}
        reporter.add(median("milliseconds_per_step", seconds, where, scale=1e3))
    ratios = np.asarray(measured[-1]) / np.asarray(measured[0])
    where = {"part": "latency", "model": "holo", "context": max(contexts)}
    value = median("latency_ratio", ratios, where)
    reporter.add(value)
    if value.low > 1.03 or value.high < 0.97:
        reporter.fail_control(
            f"a token after {max(contexts):,} takes {value.value:.3f} of one after {min(contexts):,}"
        )


def _blocks(decoder: Decoder, program: Any, decoding: Decoding, batch: int) -> Callable[[], Array]:
    """A function that begins one more block each time, on the state after the last one, in place.

    What it returns says whether all logits of the block were finite, once the block is over.
    """
    inputs, packed = decoder.inputs(batch), decoder.packed(batch)
    carried = [decoding]

    def start() -> Array:
        carried[0], _, finite = program(decoder.params, carried[0], inputs, packed)
        return finite

    return start


def _wait(finite: Array) -> float:
    """The time when a block is over."""
    if not bool(finite):
        raise FloatingPointError("logits are not finite")
    return time.perf_counter()


def _ahead(start: Callable[[], Array], steps: int, samples: int) -> list[float]:
    """Seconds a step of one block a sample, as ``generate`` runs them; one block as warm-up.

    The next block is begun before the last one is waited for: from the end of one to the end of the next the
    device waits for the host only where the host takes longer than a block.
    """
    waiting, ends = start(), []
    for _ in range(samples):
        following = start()
        ends.append(_wait(waiting))
        waiting = following
    ends.append(_wait(waiting))
    return [(after - before) / steps for before, after in itertools.pairwise(ends)]


def _samples(runs: Sequence[Callable[[], Array]], steps: int, samples: int) -> list[list[float]]:
    """Seconds a step of each run, one block a sample, in turns; one block each as warm-up.

    Each block is waited for before the next one begins.
    """
    measured: list[list[float]] = [[] for _ in runs]
    for sample in range(samples + 1):
        for index, block in enumerate(runs):
            begin = time.perf_counter()
            end = _wait(block())
            if sample:
                measured[index].append((end - begin) / steps)
    return measured
