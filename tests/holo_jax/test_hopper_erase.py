"""Kernels of pieces of long rows against the recurrence: alone in Pallas' interpreter, together on a card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.functional import accumulate
from holo_jax.kernels import mosaic
from holo_jax.kernels.call import Call
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.kernels.hopper import erase as hopper_erase
from holo_jax.kernels.hopper import forward_walk, piece_maps, piece_states, reverse_walk
from holo_jax.kernels.hopper.chunk_tiles import CHUNK, WIDTH


def draw(b: int, t: int, h: int) -> dict[str, np.ndarray]:
    """Features of norm 1, values, a cotangent and strengths, rounded to bfloat16 where kernels read that."""
    rng = np.random.default_rng(5)

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    found = {name: rounded(unit(rng.normal(size=(b, t, h, WIDTH)))) for name in ("queries", "keys")}
    found |= {name: rounded(rng.normal(size=(b, t, h, WIDTH))) for name in ("values", "cotangent")}
    for name in ("gates", "strength"):
        found[name] = rng.uniform(0.05, 0.95, size=(b, h, t)).astype(np.float32).astype(np.float64)
    chunks = np.moveaxis(found["keys"].reshape(b, -1, CHUNK, h, WIDTH), 3, 1)
    scores = found["strength"].reshape(*chunks.shape[:-1], 1) * (chunks @ np.swapaxes(chunks, -1, -2))
    inverse = np.linalg.inv(np.eye(CHUNK) + np.tril(scores, -1))
    return found | {"inverse": inverse.reshape(b, h, t, CHUNK)}


def narrowed(x: dict[str, np.ndarray], *names: str) -> list[jax.Array]:
    return [jnp.asarray(x[n], jnp.float32 if n in ("gates", "strength") else jnp.bfloat16) for n in names]


def error(found: jax.Array, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


def erased(state: np.ndarray, keys: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """``(1 - beta k k^T) state``, heads first."""
    return state - strength[..., None, None] * keys[..., :, None] * (keys[..., None, :] @ state)


def walked(x: dict[str, np.ndarray], pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps of every piece but the last, reverse terms of every piece but the first, position by position."""
    b, t, h, _ = x["keys"].shape
    length = t // pieces
    maps, terms = [], []
    for piece in range(pieces):
        at = range(piece * length, (piece + 1) * length)
        # [A, B], and the gradient of the state before the piece.
        both = np.broadcast_to(np.concatenate([np.eye(WIDTH), np.zeros((WIDTH, WIDTH))], 1), (b, h, 64, 128))
        for n in at:
            key, strength = x["keys"][:, n], x["strength"][:, :, n]
            both = erased(both, key, strength)
            written = x["gates"][:, :, n, None] * x["values"][:, n]
            both[..., WIDTH:] += key[..., :, None] * written[..., None, :]
        maps.append(np.swapaxes(both, -1, -2))
        gradient = np.zeros((b, h, WIDTH, WIDTH))
        for n in reversed(at):
            gradient = gradient + x["queries"][:, n, :, :, None] * x["cotangent"][:, n, :, None]
            gradient = erased(gradient, x["keys"][:, n], x["strength"][:, :, n])
        terms.append(np.swapaxes(gradient, -1, -2))
    return np.stack(maps[:-1], 1), np.stack(terms[1:], 1)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
def test_maps_equal_the_recurrence() -> None:
    """More chunks than stages in a piece, and pieces with others before and behind them."""
    pieces = 3
    x = draw(1, pieces * 8 * CHUNK, 2)
    maps, terms = walked(x, pieces)
    options = dict(pieces=pieces, interpret=mosaic.pallas().InterpretGPUParams())
    found = piece_maps.transitions(*narrowed(x, "keys", "values", "inverse", "gates", "strength"), **options)
    assert error(found[..., :WIDTH, :], maps[..., :WIDTH, :]) < 6e-3
    assert error(found[..., WIDTH:, :], maps[..., WIDTH:, :]) < 6e-3
    names = ("queries", "keys", "cotangent", "inverse", "strength")
    assert error(reverse_walk.terms(*narrowed(x, *names), **options), terms) < 6e-3


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
@pytest.mark.parametrize("pieces", [1, 2])
def test_retrievals_and_states_equal_the_recurrence(pieces: int) -> None:
    """Whole rows, and pieces of them from the states before them."""
    x = draw(2, 10 * CHUNK, 1)
    length = 10 * CHUNK // pieces
    state = np.zeros((2, 1, WIDTH, WIDTH))
    starts, before = [], []
    wanted = np.zeros_like(x["values"])
    for n in range(10 * CHUNK):
        if n % length == 0:
            starts.append(np.swapaxes(state, -1, -2))
        if n % CHUNK == 0:
            before.append(np.swapaxes(state, -1, -2))
        state = erased(state, x["keys"][:, n], x["strength"][:, :, n])
        written = x["gates"][:, :, n, None] * x["values"][:, n]
        state = state + x["keys"][:, n, :, :, None] * written[..., None, :]
        wanted[:, n] = (x["queries"][:, n, :, None, :] @ state)[..., 0, :]
    given = narrowed(x, "keys", "values", "inverse", "gates", "strength", "queries")
    held = jnp.asarray(np.stack(starts, 1).reshape(-1, 1, WIDTH, WIDTH), jnp.float32)
    held = None if pieces == 1 else held
    options = dict(pieces=pieces, interpret=mosaic.pallas().InterpretGPUParams())
    assert error(forward_walk.retrievals(*given, held, **options), wanted) < 6e-3
    assert error(forward_walk.states(*given[:-1], held, **options), np.stack(before, 2)) < 6e-3


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
@pytest.mark.parametrize("pieces", [1, 2])
def test_gradients_between_chunks_equal_the_recurrence(pieces: int) -> None:
    """Whole rows, and pieces of them from the gradients behind them."""
    x = draw(2, 10 * CHUNK, 1)
    length = 10 * CHUNK // pieces
    after, ends = [], []
    gradient = np.zeros((2, 1, WIDTH, WIDTH))
    for n in reversed(range(10 * CHUNK)):
        if n % CHUNK == CHUNK - 1:
            after.append(np.swapaxes(gradient, -1, -2))
        if n % length == length - 1:
            ends.append(np.swapaxes(gradient, -1, -2))
        gradient = gradient + x["queries"][:, n, :, :, None] * x["cotangent"][:, n, :, None]
        gradient = erased(gradient, x["keys"][:, n], x["strength"][:, :, n])
    behind = jnp.asarray(np.stack(ends[::-1], 1).reshape(-1, 1, WIDTH, WIDTH), jnp.float32)
    found = reverse_walk.between(
        *narrowed(x, "queries", "keys", "cotangent", "inverse", "strength"),
        None if pieces == 1 else behind,
        pieces=pieces,
        interpret=mosaic.pallas().InterpretGPUParams(),
    )
    assert error(found.astype(jnp.float32), np.stack(after[::-1], 2)) < 6e-3


@pytest.mark.parametrize("pieces", [2, 5])
def test_pieces_are_composed_in_their_order(pieces: int) -> None:
    rng = np.random.default_rng(2)
    maps = rng.normal(size=(2, pieces - 1, 3, 2 * WIDTH, WIDTH)) / 8
    terms = rng.normal(size=(2, pieces - 1, 3, WIDTH, WIDTH))
    states, gradients = (np.zeros((2, pieces, 3, WIDTH, WIDTH)) for _ in range(2))
    for piece in range(pieces - 1):
        transition, increment = np.split(maps[:, piece], 2, axis=-2)
        states[:, piece + 1] = states[:, piece] @ transition + increment
    for piece in reversed(range(1, pieces)):
        gradients[:, piece - 1] = terms[:, piece - 1]
        if piece < pieces - 1:
            gradients[:, piece - 1] += gradients[:, piece] @ np.swapaxes(maps[:, piece, :, :WIDTH], -1, -2)
    maps, terms = (jnp.asarray(a, jnp.float32) for a in (maps, terms))
    np.testing.assert_allclose(piece_states.before(maps, interpret=True), states, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        piece_states.after(maps, terms, interpret=True), gradients, rtol=1e-5, atol=1e-5
    )


def test_what_is_left_to_the_package() -> None:
    phases = jax.ShapeDtypeStruct((2, 16384, 14, 32), jnp.float32)
    gates = jax.ShapeDtypeStruct((2, 16384, 14), jnp.float32)
    values = jax.ShapeDtypeStruct((2, 16384, 14, 64), jnp.bfloat16)
    call = Call(phases, phases, values, gates, gates, "outer")
    assert hopper_erase.unsupported(call, final=False) is None
    assert "state" in (hopper_erase.unsupported(call, final=True) or "")
    packed = call._replace(segment_ids=jnp.zeros((2, 16384), jnp.int32))
    assert hopper_erase.unsupported(packed, final=False) is None
    wide = call._replace(values=jax.ShapeDtypeStruct((2, 16384, 14, 128), jnp.bfloat16))
    assert "d is 128" in (hopper_erase.unsupported(wide, final=False) or "")


@pytest.mark.skipif(hopper.missing() is not None, reason=f"needs Hopper's kernels: {hopper.missing()}")
@pytest.mark.parametrize(
    ("time", "packed"), [(63, False), (700, True), (1000, False), (2113, False), (2113, True), (4161, False)]
)
def test_rows_on_a_gpu_equal_the_definition(time: int, packed: bool) -> None:
    """Values and gradients, no further off than by the package's own form; the erase gate's much less."""
    keys = jax.random.split(jax.random.key(3), 7)
    phases = [3 * jax.random.normal(k, (2, time, 2, 32)) for k in keys[:2]]
    values = jax.random.normal(keys[2], (2, time, 2, 64), jnp.bfloat16)
    gates = jax.nn.sigmoid(jax.random.normal(keys[3], (2, time, 2)))
    erase = gates * jax.nn.sigmoid(jax.random.normal(keys[4], (2, time, 2)) - 1)
    weights = jax.random.normal(keys[5], values.shape)
    ids = jnp.cumsum(jax.random.bernoulli(keys[6], 0.004, (2, time)), 1).astype(jnp.int32) if packed else None

    def exact(*inputs):
        return accumulate(*inputs, binding="outer", segment_ids=ids)[0]

    def kernel(final):
        def run(*inputs):
            call = Call(*inputs[:2], inputs[2].astype(jnp.bfloat16), *inputs[3:], "outer", segment_ids=ids)
            keys, queries = hopper.features(call)
            assert final or hopper_erase.unsupported(call, final=False) is None
            return hopper.accumulate_features(keys, queries, call, final=final)[0].astype(jnp.float32)

        return run

    def objective(run):
        def total(*inputs):
            outputs = run(*inputs)
            return jnp.sum(outputs * weights), outputs

        return jax.jit(jax.value_and_grad(total, argnums=tuple(range(5)), has_aux=True))

    arguments = (*phases, values.astype(jnp.float32), gates, erase)
    # The package's own code promotes ranks.
    with jax.numpy_rank_promotion("allow"):
        found = [objective(run)(*arguments) for run in (exact, kernel(True), kernel(False))]
    names = ("outputs", "write", "read", "values", "gates", "erase")
    rows = zip(names, *((outputs, *gradients) for (_, outputs), gradients in found), strict=True)
    for name, wanted, theirs, ours in rows:
        size = float(jnp.linalg.norm(wanted))
        theirs, ours = (float(jnp.linalg.norm(x - wanted)) / size for x in (theirs, ours))
        assert ours < (0.01 if name == "erase" else 1.3 * theirs + 1e-4), (name, theirs, ours)
