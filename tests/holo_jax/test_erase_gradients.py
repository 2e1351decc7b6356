"""Gradients of the erase rule inside chunks, in Pallas' interpreter, against the recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from holo_jax.kernels import mosaic
from holo_jax.kernels.hopper import erase_gradients
from holo_jax.kernels.hopper.chunk_tiles import CHUNK, WIDTH

B, H, CHUNKS = 2, 2, 3
T = CHUNKS * CHUNK


def draw(scaled: bool) -> dict[str, np.ndarray]:
    """Features of norm 1, values, a cotangent and gates, rounded to bfloat16 where the kernel reads that."""
    rng = np.random.default_rng(7)

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)

    found = {n: rng.normal(size=(B, T, H, WIDTH)) for n in ("queries", "keys", "values", "cotangent")}
    for name in ("queries", "keys"):
        found[name] /= np.linalg.norm(found[name], axis=-1, keepdims=True)
    found = {name: rounded(x) for name, x in found.items()}
    found["gates"] = rng.uniform(0.05, 0.95, size=(B, H, T)).astype(np.float32).astype(np.float64)
    found["erase"] = (found["gates"] * rng.uniform(0.05, 0.95, size=(B, H, T))).astype(np.float32)
    found["erase"] = found["erase"].astype(np.float64)
    gates, erase = (np.swapaxes(found[n], 1, 2)[..., None] for n in ("gates", "erase"))
    if scaled:
        found["scaled"] = rounded(gates / erase * found["values"])
        found["values"] = erase / gates * found["scaled"]
    return found


def recurrence(x: dict[str, np.ndarray], begins: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients position by position; states before chunks, and gradients of those after them, transposed."""
    keys, queries, values, cotangent = (
        np.moveaxis(x[n], 1, 0)[..., None] for n in ("keys", "queries", "values", "cotangent")
    )
    gates, erase = (np.moveaxis(x[n], 2, 0)[..., None, None] for n in ("gates", "erase"))
    turned = lambda a: np.swapaxes(a, -1, -2)  # noqa: E731
    states, made, read = [], [], []
    state = np.zeros((B, H, WIDTH, WIDTH))
    for n in range(T):
        state = np.where(begins[:, n, None, None, None], 0, state)
        states.append(state)
        read.append(turned(state) @ keys[n])
        made.append(gates[n] * values[n] - erase[n] * read[n])
        state = state + keys[n] @ turned(made[n])
    found = {n: np.zeros_like(x[n]) for n in ("queries", "keys", "values", "gates", "erase")}
    gradient = np.zeros((B, H, WIDTH, WIDTH))
    after = np.zeros((B, H, CHUNKS, WIDTH, WIDTH))
    for n in reversed(range(T)):
        if n % CHUNK == CHUNK - 1:
            after[:, :, n // CHUNK] = turned(gradient)
        gradient = gradient + queries[n] @ turned(cotangent[n])
        found["queries"][:, n] = ((states[n] + keys[n] @ turned(made[n])) @ cotangent[n])[..., 0]
        of_made = turned(gradient) @ keys[n]
        found["keys"][:, n] = (gradient @ made[n] - states[n] @ of_made * erase[n])[..., 0]
        found["values"][:, n] = (gates[n] * of_made)[..., 0]
        found["gates"][..., n] = np.sum(of_made * values[n], axis=(-2, -1))
        found["erase"][..., n] = -np.sum(of_made * read[n], axis=(-2, -1))
        gradient = gradient - erase[n] * keys[n] @ turned(of_made)
        gradient = np.where(begins[:, n, None, None, None], 0, gradient)
    # Before a chunk stands what the position before it left, also where a segment begins.
    before = np.stack([turned(states[n * CHUNK]) for n in range(CHUNKS)], 2)
    return found | {"states": before, "of_states": after}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
@pytest.mark.parametrize(("packed", "scaled"), [(False, False), (True, True)])
def test_gradients_equal_the_recurrence(packed: bool, scaled: bool) -> None:
    x = draw(scaled)
    begins = np.zeros((B, T), bool)
    if packed:
        begins[0, [37, 38, CHUNK, CHUNK + 50, 2 * CHUNK + 63]] = begins[1, CHUNK - 1] = True
    index = np.cumsum(begins, 1)
    wanted = recurrence(x, begins)
    chunks = np.moveaxis(x["keys"].reshape(B, CHUNKS, CHUNK, H, WIDTH), 3, 1)
    linked = x["erase"].reshape(B, H, CHUNKS, CHUNK, 1) * (chunks @ np.swapaxes(chunks, -1, -2))
    by_chunk = index.reshape(B, 1, CHUNKS, CHUNK)
    same = by_chunk[..., :, None] == by_chunk[..., None, :]
    inverse = np.linalg.inv(np.eye(CHUNK) + np.tril(linked * same, -1)).reshape(B, H, T, CHUNK)
    runs = None
    if packed:
        by_chunk = by_chunk[:, 0]
        entering = np.concatenate([by_chunk[:, :1, :1], by_chunk[:, :-1, -1:]], 1)
        parts = (by_chunk - by_chunk[..., :1], by_chunk == entering, by_chunk == by_chunk[..., -1:])
        runs = erase_gradients.Runs(*(jnp.asarray(p.reshape(B, T), jnp.float32) for p in parts))
    narrow = lambda a: jnp.asarray(a, jnp.bfloat16)  # noqa: E731
    found = erase_gradients.gradients(
        *(narrow(x[n]) for n in ("queries", "keys", "scaled" if scaled else "values")),
        *(jnp.asarray(x[n], jnp.float32) for n in ("gates", "erase")),
        scaled=scaled,
        cotangent=narrow(x["cotangent"]),
        inverse=narrow(inverse),
        states=narrow(wanted["states"]),
        of_states=narrow(wanted["of_states"]),
        runs=runs,
        programs=2,
        interpret=mosaic.pallas().InterpretGPUParams(),
    )
    for name, ours in found._asdict().items():
        error = np.linalg.norm(np.asarray(ours, np.float64) - wanted[name]) / np.linalg.norm(wanted[name])
        assert error < 6e-3, (name, error)
