"""Equality before speed for what stands around the memory, by kernel, against float64.

Denoiser and loss; where they can run, residual sum and norm with products, norm and gate of a retrieval with
its output map, and features of convolved phases.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.common import Reporter
from eval.results import absent, exact
from eval.speed_parts.gate import errors
from eval.speed_parts.timing import failure
from holo_jax.functional import accumulate, retrieval_scale
from holo_jax.functional.cross_entropy import IGNORE, chunked_cross_entropy
from holo_jax.kernels import block, convolved_sum, linear_cross_entropy, swiglu, swiglu_runs
from holo_jax.kernels.call import Call
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.sequence import short_convolutions, with_tail

# 16-bit operands and results: plain products in bfloat16 are off by up to 8e-3 on these inputs.
LIMIT = 2e-2
_ROWS, _WIDTH, _HIDDEN, _VOCABULARY = 384, 256, 512, 1000
_TIME = 333  # of the sum's rows
_LONG = 2113  # of rows that are cut in pieces


def denoiser_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict[str, np.ndarray]]:
    """(kernel or portable form, float64 form, inputs); both return a scalar and the output."""
    shapes = {"x": (2, _ROWS // 2, _WIDTH), "gate": (_WIDTH, _HIDDEN), "up": (_WIDTH, _HIDDEN)}
    inputs = {name: rng.normal(size=shape) / np.sqrt(_WIDTH) for name, shape in shapes.items()}
    inputs["x"] *= np.sqrt(_WIDTH)
    inputs["down"] = rng.normal(size=(_HIDDEN, _WIDTH)) / np.sqrt(_HIDDEN)
    cotangent = _rounded(rng.normal(size=shapes["x"]))

    def measured(p: dict) -> Any:
        y = swiglu(p["x"].astype(jnp.bfloat16), p["gate"], p["up"], p["down"])
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    def wanted(p: dict) -> Any:
        y = (jax.nn.silu(p["x"] @ p["gate"]) * (p["x"] @ p["up"])) @ p["down"]
        return jnp.sum(y * cotangent), y

    return measured, wanted, inputs


def loss_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict[str, np.ndarray]]:
    """The same for the loss of an output projection, with targets that are ignored."""
    inputs = {
        "hidden": rng.normal(size=(2, _ROWS // 2, _WIDTH)),
        "weights": rng.normal(size=(_WIDTH, _VOCABULARY)) / np.sqrt(_WIDTH),
    }
    targets = rng.integers(0, _VOCABULARY, (2, _ROWS // 2)).astype(np.int32)
    targets[:, ::7] = IGNORE

    def measured(p: dict) -> Any:
        hidden = p["hidden"].astype(jnp.bfloat16)
        total, _ = linear_cross_entropy(hidden, p["weights"], jnp.asarray(targets), chunk_tokens=256)
        return total, total

    def wanted(p: dict) -> Any:
        total, _ = chunked_cross_entropy(
            p["hidden"], p["weights"], jnp.asarray(targets), chunk_tokens=256, logits_dtype="float64"
        )
        return total, total

    return measured, wanted, inputs


def _norm(x: Any, scale: Any, bias: Any) -> Any:
    lead = (None,) * (x.ndim - scale.ndim)
    x = x if bias is None else x - jnp.mean(x, axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale[lead]
    return x if bias is None else x + bias[lead]


def norm_case(rng: np.random.Generator, *, centered: bool = False) -> tuple[Callable, Callable, dict]:
    """A residual sum, and two products of its norm; ``centered``: behind a bias, LayerNorm."""
    shape = (2, _ROWS // 2, _WIDTH)
    inputs = {"x": rng.normal(size=shape), "delta": rng.normal(size=shape)}
    inputs |= {"scale": rng.normal(size=_WIDTH), "bias": rng.normal(size=_WIDTH)}
    inputs["offset"] = rng.normal(size=_WIDTH)
    if not centered:
        del inputs["bias"], inputs["offset"]
    inputs |= {name: rng.normal(size=(_WIDTH, 64)) / np.sqrt(_WIDTH) for name in ("first", "second")}
    cotangents = [_rounded(rng.normal(size=(*shape[:2], width))) for width in (_WIDTH, 64, 64)]

    def measured(p: dict) -> Any:
        total, products = block.normed_products(
            p["x"].astype(jnp.bfloat16),
            p["delta"].astype(jnp.bfloat16),
            p.get("offset"),
            p["scale"],
            p.get("bias"),
            (p["first"], p["second"]),
            dtypes=(jnp.bfloat16, jnp.float32),
            eps=1e-5,
        )
        return _weighted((total, *products), cotangents), jnp.concatenate([total, *products], axis=-1)

    def wanted(p: dict) -> Any:
        total = p["x"] + p["delta"]
        total = total if "offset" not in p else total + p["offset"][None, None]
        rows = _norm(total, p["scale"], p.get("bias"))
        results = (total, rows @ p["first"], rows @ p["second"])
        return _weighted(results, cotangents), jnp.concatenate(results, axis=-1)

    return measured, wanted, inputs


def centered_norm_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """The same of a branch with a bias, and LayerNorm."""
    return norm_case(rng, centered=True)


def normed_denoiser_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """A residual sum, and the denoiser of its norm."""
    _, _, inputs = denoiser_case(rng)
    inputs |= {"delta": rng.normal(size=inputs["x"].shape), "scale": rng.normal(size=_WIDTH)}
    cotangents = [_rounded(rng.normal(size=inputs["x"].shape)) for _ in range(2)]

    def measured(p: dict) -> Any:
        x, delta = (p[name].astype(jnp.bfloat16) for name in ("x", "delta"))
        found = block.normed_swiglu(x, delta, p["scale"], None, p["gate"], p["up"], p["down"], eps=1e-5)
        weighted = sum(jnp.sum(y.astype(jnp.float32) * c) for y, c in zip(found, cotangents, strict=True))
        return weighted, jnp.concatenate(found, axis=-1)

    def wanted(p: dict) -> Any:
        total = p["x"] + p["delta"]
        rows = _norm(total, p["scale"], None)
        y = (jax.nn.silu(rows @ p["gate"]) * (rows @ p["up"])) @ p["down"]
        weighted = jnp.sum(total * cotangents[0]) + jnp.sum(y * cotangents[1])
        return weighted, jnp.concatenate([total, y], axis=-1)

    return measured, wanted, inputs


def normed_gelu_case(rng: np.random.Generator, *, keep: bool = False) -> tuple[Callable, Callable, dict]:
    """The same with a GELU behind a bias, and LayerNorm."""
    shape = (2, _ROWS // 2, _WIDTH)
    inputs = {"x": rng.normal(size=shape), "delta": rng.normal(size=shape)}
    inputs |= {name: rng.normal(size=_WIDTH) for name in ("scale", "bias")}
    inputs |= {
        "up": rng.normal(size=(_WIDTH, _HIDDEN)) / np.sqrt(_WIDTH),
        "up_bias": rng.normal(size=_HIDDEN),
    }
    inputs["down"] = rng.normal(size=(_HIDDEN, _WIDTH)) / np.sqrt(_HIDDEN)
    cotangents = [_rounded(rng.normal(size=shape)) for _ in range(2)]
    names = ("scale", "bias", "up", "up_bias", "down")

    def measured(p: dict) -> Any:
        x, delta = (p[name].astype(jnp.bfloat16) for name in ("x", "delta"))
        found = block.normed_gelu(x, delta, *(p[name] for name in names), eps=1e-5, keep=keep)
        return _weighted(found, cotangents), jnp.concatenate(found, axis=-1)

    def wanted(p: dict) -> Any:
        total = p["x"] + p["delta"]
        rows = _norm(total, p["scale"], p["bias"]) @ p["up"] + p["up_bias"][None, None]
        found = (total, jax.nn.gelu(rows, approximate=False) @ p["down"])
        return _weighted(found, cotangents), jnp.concatenate(found, axis=-1)

    return measured, wanted, inputs


def kept_gelu_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """The same with its activation kept for the backward pass."""
    return normed_gelu_case(rng, keep=True)


def factors_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """Values times a factor a head."""
    shape = (2, _ROWS // 2, 4, 64)
    inputs = {"values": rng.normal(size=shape), "factors": rng.uniform(0.5, 2.0, size=shape[:3])}
    cotangent = _rounded(rng.normal(size=shape))

    def measured(p: dict) -> Any:
        y = block.scaled_heads(p["values"].astype(jnp.bfloat16), p["factors"])
        return _weighted((y,), (cotangent,)), y

    def wanted(p: dict) -> Any:
        y = p["values"] * p["factors"][..., None]
        return _weighted((y,), (cotangent,)), y

    return measured, wanted, inputs


def retrieval_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """Norm and gate of a retrieval, and the output map."""
    heads, width = 4, 64
    shape = (2, _ROWS // 2, heads, width)
    inputs = {"values": rng.normal(size=shape), "factors": rng.uniform(0.5, 2.0, size=shape[:3])}
    inputs |= {"gate": rng.normal(size=(*shape[:2], heads * width)), "weight": rng.normal(size=shape[2:])}
    inputs["out"] = rng.normal(size=(heads * width, _WIDTH)) / np.sqrt(_WIDTH)
    cotangent = _rounded(rng.normal(size=(*shape[:2], _WIDTH)))

    def measured(p: dict) -> Any:
        values, gate = (p[name].astype(jnp.bfloat16) for name in ("values", "gate"))
        y = block.gated_product(values, p["factors"], gate, p["weight"], p["out"], eps=1e-5)
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    def wanted(p: dict) -> Any:
        rows = _norm(p["values"] * p["factors"][..., None], p["weight"], None)
        y = (rows.reshape(p["gate"].shape) * jax.nn.silu(p["gate"])) @ p["out"]
        return jnp.sum(y * cotangent), y

    return measured, wanted, inputs


def features_case(rng: np.random.Generator, *, gated: bool = False) -> tuple[Callable, Callable, dict]:
    """Features of convolved phases and two gates a head, in packed rows of an odd length and width."""
    heads, m, taps, time = 2, 32, 4, 157
    inputs = {"raw": 3 * rng.normal(size=(2, time, heads * m + 2 * heads + 3))}
    inputs["taps"] = rng.normal(size=(2, taps, heads * m))
    inputs["bias"] = rng.normal(size=(2, heads))
    inside = np.stack([np.arange(time) % 37, np.arange(time) % 111]).astype(np.uint32)
    cotangents = [_rounded(rng.normal(size=(2, time, heads, 2 * m))) for _ in range(2)]
    cotangents += [rng.normal(size=(2, heads, time)) for _ in range(2)]

    def measured(p: dict) -> Any:
        keys, queries, gates = block.convolved_features(
            p["raw"],
            p["taps"],
            p["bias"],
            jnp.asarray(inside, jnp.int32),
            m=m,
            dtype=jnp.bfloat16,
            gated=gated,
        )
        return _weighted((keys, queries, *gates), cotangents), _flat(keys, queries, *gates)

    def wanted(p: dict) -> Any:
        phases, *raw_gates = jnp.split(p["raw"], heads * m + heads * np.arange(3), axis=-1)[:3]
        past = with_tail(phases, taps - 1)
        convolved = short_convolutions(past, tuple(p["taps"]), jnp.asarray(inside))
        shaped = [x.reshape(2, time, heads, m) for x in convolved]
        keys, queries = (jnp.concatenate([jnp.cos(x), jnp.sin(x)], axis=-1) / np.sqrt(m) for x in shaped)
        gates = [jax.nn.sigmoid(x + bias[None, None]) for x, bias in zip(raw_gates, p["bias"], strict=True)]
        keys = gates[0][..., None] * keys if gated else keys
        found = (keys, queries, *(jnp.swapaxes(gate, 1, 2) for gate in gates))
        return _weighted(found, cotangents), _flat(*found)

    return measured, wanted, inputs


def sum_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """The outer memory without erase from raw phases and gates, in packed rows of an odd length."""
    heads, m, taps, time = 2, 32, 4, _TIME
    inputs = {"raw": rng.normal(size=(2, time, heads * m + heads + 2))}
    inputs["taps"] = rng.normal(size=(2, taps, heads * m))
    inputs["bias"] = rng.normal(size=(1, heads))
    inputs["values"] = rng.normal(size=(2, time, heads, 64))
    ids = np.stack([np.arange(time) // 171, np.arange(time) // 61])
    inside = np.stack([np.arange(time) % 171, np.arange(time) % 61]).astype(np.uint32)
    cotangents = [_rounded(rng.normal(size=inputs["values"].shape)), rng.normal(size=(2, heads, time))]

    def measured(p: dict) -> Any:
        borders = jnp.asarray(inside, jnp.int32), jnp.asarray(ids, jnp.int32)
        found = convolved_sum(p["raw"], p["taps"], p["bias"], p["values"].astype(jnp.bfloat16), *borders)
        return _weighted(found, cotangents), _flat(*found)

    def wanted(p: dict) -> Any:
        phases, raw_gates = jnp.split(p["raw"], heads * m + heads * np.arange(2), axis=-1)[:2]
        convolved = short_convolutions(with_tail(phases, taps - 1), tuple(p["taps"]), jnp.asarray(inside))
        write, read = (x.reshape(2, time, heads, m) for x in convolved)
        gates = jax.nn.sigmoid(raw_gates + p["bias"][None])
        options = dict(binding="outer", method="recurrent", segment_ids=jnp.asarray(ids))
        found = accumulate(write, read, p["values"], gates, **options)[0], jnp.swapaxes(gates, 1, 2)
        return _weighted(found, cotangents), _flat(*found)

    return measured, wanted, inputs


def pieces_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """The outer memory with erase from features, in rows of an odd length that kernels cut in pieces."""
    return erase_case(rng, time=_LONG, packed=False)


def erase_case(
    rng: np.random.Generator, *, time: int = _TIME, packed: bool = True
) -> tuple[Callable, Callable, dict]:
    """The same in packed rows."""
    shape = (2, time, 2)
    inputs = {name: 3 * rng.normal(size=(*shape, 32)) for name in ("write", "read")}
    inputs |= {"values": rng.normal(size=(*shape, 64)), "gates": rng.uniform(0.1, 0.9, size=shape)}
    inputs["erase"] = inputs["gates"] * rng.uniform(0.1, 0.9, size=shape)
    cotangent = _rounded(rng.normal(size=inputs["values"].shape))
    names = ("write", "read", "values", "gates", "erase")
    ids = np.stack([np.arange(time) // 171, np.arange(time) // 61]).astype(np.int32) if packed else None

    def measured(p: dict) -> Any:
        write, read, values, *gates = (p[name] for name in names)
        borders = None if ids is None else jnp.asarray(ids)
        call = Call(write, read, values.astype(jnp.bfloat16), *gates, "outer", segment_ids=borders)
        keys, queries = hopper.features(call)
        y, _ = hopper.accumulate_features(keys, queries, call, final=False)
        return _weighted((y,), (cotangent,)), y

    def wanted(p: dict) -> Any:
        borders = None if ids is None else jnp.asarray(ids)
        options = dict(binding="outer", method="recurrent", segment_ids=borders)
        y, _ = accumulate(*(p[name] for name in names), **options)
        return _weighted((y,), (cotangent,)), y

    return measured, wanted, inputs


def gated_features_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """The same with the write gate in the keys, as the plain sum takes them."""
    return features_case(rng, gated=True)


def scale_case(rng: np.random.Generator) -> tuple[Callable, Callable, dict]:
    """What retrievals are multiplied by, in packed rows of an odd length longer than a piece."""
    shape = (2, 3, 2357)
    inputs = {"gates": rng.uniform(size=shape)}
    ids = np.stack([np.arange(shape[2]) // 371, np.arange(shape[2]) // 1111])
    inside = np.stack([np.arange(shape[2]) % 371, np.arange(shape[2]) % 1111])
    cotangents = [rng.normal(size=(shape[0], shape[2], shape[1])) for _ in range(2)]

    def measured(p: dict) -> Any:
        found = [block.write_factors(p["gates"], x) for x in (None, jnp.asarray(inside, jnp.int32))]
        return _weighted(found, cotangents), jnp.stack(found)

    def wanted(p: dict) -> Any:
        gates = jnp.swapaxes(p["gates"], 1, 2)
        found = [1.0 / retrieval_scale("sqrt_writes", gates, segment_ids=x) for x in (None, jnp.asarray(ids))]
        return _weighted(found, cotangents), jnp.stack(found)

    return measured, wanted, inputs


def cases() -> dict[str, Callable]:
    """What this device can run, by name."""
    found: dict[str, Callable] = {"denoiser": denoiser_case, "loss": loss_case}
    rows = jax.ShapeDtypeStruct((2, _ROWS // 2, _WIDTH), jnp.bfloat16)
    if block.unsupported(rows) is None:
        found |= {"norm": norm_case, "centered norm": centered_norm_case}
        found |= {"normed gelu": normed_gelu_case, "kept gelu": kept_gelu_case}
        if swiglu_runs(rows, jax.ShapeDtypeStruct((_WIDTH, _HIDDEN), jnp.float32), "auto"):
            found["normed denoiser"] = normed_denoiser_case
    if block.mixer_unsupported(rows, 32, 64) is None:
        found |= {"retrieval": retrieval_case, "factors": factors_case}
        found |= {"features": features_case, "gated features": gated_features_case, "scale": scale_case}
        found["sum"] = sum_case
        if hopper.missing() is None:
            found |= {"erase": erase_case, "pieces": pieces_case}
    return found


def run(reporter: Reporter, *, seed: int) -> bool:
    """Reports every error; whether all are within the limit."""
    passed = True
    for name, case in cases().items():
        measured, wanted, inputs = case(np.random.default_rng(seed))
        inputs = {key: _rounded(array) for key, array in inputs.items()}
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            reference = _named(jax.jit(jax.value_and_grad(wanted, has_aux=True))(inputs))
        where = {"part": "gate", "case": name}
        try:
            narrow = {key: jnp.asarray(array, jnp.float32) for key, array in inputs.items()}
            found = _named(jax.jit(jax.value_and_grad(measured, has_aux=True))(narrow))
        except Exception as error:
            reporter.add(absent("relative_error", "failed", detail=failure(error)[1], array="all", **where))
            passed = False
            continue
        for key, error in errors(found, reference).items():
            passed = passed and error <= LIMIT
            if np.isfinite(error):
                reporter.add(exact("relative_error", error, detail=f"limit {LIMIT:g}", array=key, **where))
            else:
                reporter.add(absent("relative_error", "failed", detail="not finite", array=key, **where))
    if not passed:
        reporter.fail_control("a kernel of the block differs from its definition: no model is timed")
    return passed


def _weighted(results: Any, cotangents: Any) -> Any:
    wide = jnp.result_type(float)
    return sum(jnp.sum(x.astype(wide) * c) for x, c in zip(results, cotangents, strict=True))


def _flat(*results: Any) -> Any:
    return jnp.concatenate([x.astype(jnp.result_type(float)).reshape(-1) for x in results])


def _named(found: Any) -> dict[str, np.ndarray]:
    (_, output), gradients = found
    named = {"output": output} | {f"d_{name}": array for name, array in gradients.items()}
    return {name: np.asarray(array, np.float64) for name, array in named.items()}


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)
