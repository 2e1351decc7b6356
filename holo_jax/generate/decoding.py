"""Generating tokens: a compiled loop over a block of tokens, and the call that runs blocks until done."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from holo_jax.array_types import Array, Bool, Float, Int, UInt32
from holo_jax.config import HoloConfig
from holo_jax.generate.checks import (
    Row,
    as_count,
    as_rows,
    as_seeds,
    check_batch,
    check_ids,
    check_room,
)
from holo_jax.generate.counts import Counts, left, unpacked
from holo_jax.generate.drawing import drawing_of, first_input, next_token
from holo_jax.generate.forms import decoding_form, is_split, owned, split_state, stack_state
from holo_jax.generate.hashed import Hashed
from holo_jax.generate.pending import GROUP, hold_layers, holds, release_layers
from holo_jax.generate.reading import PIECE_SIZE, Reading, init_state, next_logits, prefill, read
from holo_jax.generate.sampling import Plan, Sampling, SamplingNumbers, draw, row_keys
from holo_jax.generate.state_precision import stored_dtype
from holo_jax.generate.stepping import (
    PORTABLE,
    Form,
    choose,
    first_launch,
    join_held,
    logits_of,
    no_hidden,
    pack,
    reusable,
    room_for_mail,
    scaled_logits,
    split_held,
    through_blocks,
    unscaled,
)
from holo_jax.model import HoloForCausalLM, ModelState, positional_turns

BLOCK_SIZE = 64
_CACHE_MULTIPLE = 64
NONE = -1  # in place of a token: the row was finished

Callback = Callable[[list[list[int]]], None]


class Decoding(NamedTuple):
    """What the loop carries.

    Attributes:
      logits: of each row's next token [b, v].
      state: after everything read, in the form of ``loop_state``.
      remaining: tokens that each row may still generate; 0 once it is finished.
      seen: tokens that the repetition penalty applies to [b, v], or None without one.
    """

    logits: Float[Array, "b v"]
    state: ModelState
    remaining: Int[Array, "b"]
    seen: Bool[Array, "b v"] | None


class DecodingInputs(NamedTuple):
    """What the loop is given and does not change.

    Attributes:
      numbers: of the sampling.
      seeds: one a row.
      stop_tokens: ids that end a row [s]; -1 ends none.
      allowed: number of ids that may be drawn, from 0.
    """

    numbers: SamplingNumbers
    seeds: UInt32[Array, "b"]
    stop_tokens: Int[Array, "s"]
    allowed: Int[Array, ""]


class Generated(NamedTuple):
    """The result of ``generate``.

    Attributes:
      tokens: the ids generated for each row, a stop token included.
      stopped: for each row, whether a stop token ended it.
      logits, state: after the prompt and all of ``tokens``; to go on from.
      seen: for the repetition penalty of a call that goes on from here; None without one.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    logits: Float[Array, "b v"]
    state: ModelState
    seen: Bool[Array, "b v"] | None


def generate(
    model: HoloForCausalLM,
    prompts: Any = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    seeds: int | Sequence[int] = 0,
    state: ModelState | None = None,
    logits: Float[Array, "b v"] | None = None,
    seen: Bool[Array, "b v"] | None = None,
    state_dtype: str = "float32",
    allowed_tokens: int | None = None,
    callback: Callback | None = None,
    block_size: int = BLOCK_SIZE,
    piece_size: int = PIECE_SIZE,
) -> Generated:
    """Reads the prompts and generates from each of them.

    Prompts may have different lengths. Each row's result is what it would be alone, up to the rounding of
    batched products: its noise depends on its own seed and position, and finished rows stand still. Tokens
    are drawn and read by one compiled loop of ``block_size`` tokens; the host hears of them once a block,
    when the next one has begun.

    Args:
      model: the model; pass ``decoding_form(model)`` to convert it once for many calls.
      prompts: ids, one sequence a row. None goes on from ``state`` and ``logits``.
      max_new_tokens: most tokens to generate for a row.
      sampling: how they are drawn; by default from the model's own distribution.
      stop_tokens: ids that end a row.
      seeds: one a row, or one that every row uses as if it were alone.
      state: what was read before the prompts; it is not changed. None begins anew.
      logits: what ``state`` predicts; only without prompts.
      seen: tokens read before the prompts that the repetition penalty applies to, with it only.
      state_dtype: of the state made if ``state`` is None, see ``init_state``.
      allowed_tokens: ids from here on are never drawn (a vocabulary padded beyond its tokenizer).
      callback: called after every block with the new ids of each row, in order; it may raise to stop.
      block_size: tokens in a block.
      piece_size: see ``prefill``.

    Raises:
      ValueError: for an empty prompt, an id out of range, a count below 1, or arguments that do not fit
        together.
      CacheFullError: if attention layers have no room for prompts and new tokens.
      TypeError: for ids, counts or seeds that are not integers.
      FloatingPointError: if the model's logits are not finite.
    """
    config = model.config
    sampling = Sampling() if sampling is None else sampling
    max_new_tokens = as_count("max_new_tokens", max_new_tokens, 1)
    block_size = as_count("block_size", block_size, 1)
    allowed = config.vocab_size if allowed_tokens is None else as_count("allowed_tokens", allowed_tokens, 1)
    if allowed > config.vocab_size:
        raise ValueError(f"allowed_tokens is {allowed}; the model has {config.vocab_size} ids")
    if sampling.top_k > allowed:
        raise ValueError(f"top_k is {sampling.top_k}; it must be at most the number of ids, {allowed}")
    stops = np.asarray([as_count("stop_tokens", token, 0) for token in stop_tokens], np.int32)
    if stops.size:
        check_ids("stop_tokens", stops, config.vocab_size)
    if seen is not None and not sampling.penalises:
        raise ValueError("seen is given without a repetition penalty; it has no other use")

    rows, start = _start(model, prompts, state, logits, max_new_tokens, state_dtype, piece_size)
    batch = start.state.position.shape[0]
    inputs = DecodingInputs(
        numbers=sampling.numbers,
        seeds=jnp.asarray(as_seeds(seeds, batch)),
        # Padded, so that another few stop tokens compile nothing.
        stop_tokens=jnp.asarray(np.pad(stops, (0, -stops.size % 4 or 4), constant_values=NONE)),
        allowed=jnp.int32(allowed),
    )
    model = decoding_form(model)
    graphdef, params = nnx.split(model, nnx.Param)
    form = choose(config, batch) if stored_dtype(start.state) == "float32" else PORTABLE
    packed = pack(model, form)
    decoding = Decoding(
        logits=start.logits,
        state=loop_state(config, start.state, form),
        remaining=jnp.full((batch,), max_new_tokens, jnp.int32),
        seen=_seen(rows, seen, batch, config.vocab_size) if sampling.penalises else None,
    )
    decoding = owned(params, decoding)
    definition = Hashed(graphdef)
    how = dict(steps=min(block_size, max_new_tokens), plan=sampling.plan, form=form)

    def begin(decoding: Decoding) -> Any:
        return block_of(form)(definition, params, decoding, inputs, packed, **how)

    tokens: list[list[int]] = [[] for _ in range(batch)]
    blocks = -(-max_new_tokens // block_size)
    begun = begin(decoding)
    for number in range(blocks):
        decoding, block, finite = begun
        if number + 1 < blocks:
            # Before this one is waited for, so that the device does not wait for the host.
            begun = begin(decoding)
        if not bool(finite):
            raise FloatingPointError(
                "the model's logits are not finite; its parameters or state hold NaN or infinity"
            )
        new = [[int(token) for token in row if token != NONE] for row in np.asarray(block)]
        for row, ids in zip(tokens, new, strict=True):
            row.extend(ids)
        if callback is not None:
            callback(new)
        if all(len(row) == max_new_tokens or row[-1] in stops for row in tokens):
            break
    # In a block begun for nothing rows stand still.
    decoding = begun[0]
    state = decoding.state._replace(layers=release_layers(decoding.state.layers))
    state = split_state(state) if is_split(start.state.layers) else stack_state(state)
    stopped = [bool(row) and row[-1] in stops for row in tokens]
    return Generated(tokens, stopped, decoding.logits, state, decoding.seen)


# Where a loop over groups stands: its ``Decoding``, the residual stream after the last block, the next token,
# whether all logits were finite, how often it went round, and ``stepping.reusable``.
_Grouped = tuple[Decoding, Array, Array, Array, Array, Any]


def _decode_block(
    graphdef: Any,
    params: Any,
    decoding: Decoding,
    inputs: DecodingInputs,
    packed: Any = None,
    *,
    steps: int,
    plan: Plan,
    form: Form = PORTABLE,
) -> tuple[Decoding, Int[Array, "b steps"], Bool[Array, ""]]:
    """Draws and reads ``steps`` tokens a row on the device.

    The number of iterations is known when compiling, so the host is not asked between tokens. Rows that
    are finished read padding, which leaves their state as it is.

    Args:
      graphdef, params: ``nnx.split(decoding_form(model), nnx.Param)``; the first may be ``Hashed``.
      decoding: where it stands; its buffers are reused.
      inputs: see ``DecodingInputs``.
      packed: ``stepping.pack`` of the model for this form.
      steps: tokens to draw.
      plan: ``Sampling.plan``.
      form: how tokens are read; ``decoding.state`` is ``loop_state`` of the same form.

    Returns:
      Where it stands then, the tokens (-1 for rows that were finished) and whether all logits were finite.
    """
    model = nnx.merge(graphdef.value if isinstance(graphdef, Hashed) else graphdef, params)
    turns = positional_turns(model.config)
    permitted = jnp.arange(model.config.vocab_size)[None] < inputs.allowed
    groups = -(-steps // GROUP)
    size = -(-steps // groups)
    mail = room_for_mail(model.config, form, decoding.remaining.shape[0])
    by_kernels = form.drawn and not plan.filters and decoding.seen is None

    def drawn(logits: Array, keys: Array, seen: Array | None) -> tuple[Array, Array]:
        allowed = jnp.where(permitted, logits, -jnp.inf)
        return draw(allowed, inputs.numbers, keys, seen, jnp.isfinite(logits), plan=plan)

    def noted(seen: Array | None, token: Array, active: Array) -> Array | None:
        if seen is None:
            return None
        return seen | (active[:, None] & (token[:, None] == jnp.arange(seen.shape[1])[None]))

    def one(carry: tuple[Decoding, Array], _: None) -> tuple[tuple[Decoding, Array], Array]:
        now, finite = carry
        token, checks = drawn(now.logits, row_keys(inputs.seeds, now.state.position), now.seen)
        active = now.remaining > 0
        hidden, state = read(model, jnp.where(active, token, 0)[:, None], now.state, active[:, None], turns)
        logits = jnp.where(active[:, None], next_logits(model, hidden), now.logits)
        remaining = left(now.remaining, token, active, inputs.stop_tokens)
        now = Decoding(logits, state, remaining, noted(now.seen, token, active))
        return (now, finite & jnp.all(checks)), jnp.where(active, token, NONE)

    def group(carry: _Grouped, no: None) -> tuple[_Grouped, Array]:
        now, hidden, token, finite, number, used = carry
        fixed, moving = split_held(now.state.layers, size, used, mail)
        segment, start = now.state.segment, now.state.position
        # Of what follows each token; a row that reads one has read all of the group before it.
        positions = start[None] + jnp.arange(1, size + 1, dtype=jnp.uint32)[:, None]
        keys = row_keys(inputs.seeds, positions)
        drawing = None
        if by_kernels:
            drawing = drawing_of(inputs.numbers, keys, inputs.allowed, plan)

        def one(carry: Any, no: None, joins: int = 0) -> tuple[Any, None]:
            numbers, x, _, hidden, layers, seen = carry
            now = unpacked(numbers)
            # Not the loop's own count: a number sliced out of an array at that is a copy of its own.
            index = now.before[0]
            state = ModelState(layers, now.position, segment)
            ids = jnp.where(now.active, now.token, 0)
            at = (fixed, state, index, now.active, turns, form, packed, numbers, x)
            hidden, state = through_blocks(model, ids, hidden, *at, joins=joins)
            if drawing is not None:
                given = (model, hidden, drawing, numbers, inputs.stop_tokens, form, packed)
                logits, numbers, x = next_token(*given)
            else:
                seen = noted(seen, now.token, now.active)
                logits = logits_of(model, hidden, form, packed)
                numbers = now.after(*drawn(logits, keys[index], seen), inputs.stop_tokens).packed()
            return (numbers, x, logits, hidden, state.layers, seen), None

        zeros = jnp.zeros_like(now.remaining)
        # The last group may be longer than what is left of the steps.
        limit = zeros + jnp.minimum(steps - number * size, size)
        counts = Counts(
            before=zeros,
            active=(now.remaining > 0) & (limit > 0),
            position=start,
            launch=zeros + first_launch(moving),
            token=token,
            remaining=now.remaining,
            limit=limit,
            finite=finite,
            tokens=jnp.full((size, start.shape[0]), NONE, jnp.int32),
        )
        x = first_input(model, counts) if by_kernels else None
        looped = (counts.packed(), x, now.logits, hidden, moving, now.seen)
        # An even number of tokens a turn leaves what is made where it was found: nothing is copied.
        # Counting a turn is 1 to 3 us.
        unroll = 4 if form.stacked else 3 if form.joined else 1
        looped, _ = jax.lax.scan(one, looped, length=size - form.joined, unroll=unroll)
        if form.joined:
            looped, _ = one(looped, None, size)
        numbers, _, logits, hidden, layers, seen = looped
        counts = unpacked(numbers)
        count = (counts.position - start).astype(jnp.int32)
        state = ModelState(join_held(fixed, layers, count, size, form), counts.position, segment)
        now = Decoding(logits, state, counts.remaining, seen)
        after = (now, hidden, counts.token, counts.finite, number + 1, reusable(layers, form, size))
        return after, counts.tokens

    if not holds(decoding.state.layers):
        (after, finite), tokens = jax.lax.scan(one, (decoding, jnp.bool_(True)), length=steps)
        return after, tokens.T, finite & jnp.all(jnp.isfinite(after.logits))
    rows = decoding.remaining.shape[0]
    used = reusable(split_held(decoding.state.layers, size, mail=mail)[1], form, 0)
    token, checks = drawn(decoding.logits, row_keys(inputs.seeds, decoding.state.position), decoding.seen)
    looped = (decoding, no_hidden(model.config, rows), token, checks, jnp.int32(0), used)
    (after, hidden, _, checks, _, _), tokens = jax.lax.scan(group, looped, length=groups)
    if by_kernels and unscaled(model.config, form):
        after = after._replace(logits=scaled_logits(model, after.logits, hidden))
    # What rows that read nothing predict was made of nothing.
    began = (decoding.remaining > 0)[:, None]
    after = after._replace(logits=jnp.where(began, after.logits, decoding.logits))
    finite = jnp.all(checks) & jnp.all(jnp.isfinite(after.logits))
    return after, tokens.reshape(groups * size, -1)[:steps].T, finite


_compiled = partial(jax.jit, static_argnums=0, static_argnames=("steps", "plan", "form"), donate_argnums=2)
decode_block = _compiled(_decode_block)
_by_cublas = _compiled(_decode_block, compiler_options={"xla_gpu_enable_triton_gemm": False})


def block_of(form: Form) -> Any:
    """``decode_block`` with the compiler's options of a form."""
    return _by_cublas if form.cublas else decode_block


def loop_state(config: HoloConfig, state: ModelState, form: Form = PORTABLE) -> ModelState:
    """A state as the loop carries it: memories as planes where they can be, else split over periods.

    A state in fewer bits is rounded after every token, so none of its writes are held back in any form.
    """
    if stored_dtype(state) != "float32":
        return split_state(state)
    state = stack_state(state) if form.stacked else split_state(state)
    return state._replace(layers=hold_layers(config, state.layers))


def _start(
    model: HoloForCausalLM,
    prompts: Any,
    state: ModelState | None,
    logits: Array | None,
    max_new_tokens: int,
    state_dtype: str,
    piece_size: int,
) -> tuple[list[Row], Reading]:
    """The rows of the prompts, and what has been read when generation begins."""
    config = model.config
    if prompts is None:
        if state is None or logits is None:
            raise ValueError("prompts is None; going on without a prompt needs state and logits")
        batch = state.position.shape[0]
        if logits.shape != (batch, config.vocab_size):
            raise ValueError(
                f"logits has shape {logits.shape}; it must be ({batch}, {config.vocab_size}), as the state"
            )
        check_room(state, config, np.full(batch, max_new_tokens))
        return [], Reading(jnp.asarray(logits, jnp.float32), state)
    if logits is not None:
        raise ValueError("logits is given with prompts; they belong to a state without them")
    rows = as_rows(prompts, config.vocab_size)
    lengths = np.asarray([len(row) for row in rows])
    if state is None:
        # Rounded up, so that prompts of other lengths compile nothing.
        room = -(-(int(lengths.max()) + max_new_tokens) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        state = init_state(config, len(rows), cache_length=room, state_dtype=state_dtype)
    check_batch(state, len(rows))
    check_room(state, config, lengths + max_new_tokens)
    return rows, prefill(model, rows, state, piece_size=piece_size)


def _seen(rows: list[Row], seen: Array | None, batch: int, vocab_size: int) -> Array:
    before = np.zeros((batch, vocab_size), bool) if seen is None else np.array(seen, bool)
    if before.shape != (batch, vocab_size):
        raise ValueError(f"seen has shape {before.shape}; it must be ({batch}, {vocab_size})")
    for index, row in enumerate(rows):
        before[index, row] = True
    return jnp.asarray(before)
