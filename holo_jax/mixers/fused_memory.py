"""The memory mixer in training on one GPU: the same mathematics as ``MemoryMixer``, with fewer passes.

Phases become features of keys in the kernel that convolves them (``kernels.block``), the memory's kernel
reads those, and norm, gate and output map follow in one piece; our own kernels of the sum make features
themselves (``kernels.convolved_sum``). It covers reading whole sequences by content into an outer memory
whose kernel is chosen for them; everything else is ``MemoryMixer``'s own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from holo_jax import kernels
from holo_jax.array_types import Array, Float
from holo_jax.kernels.call import Call
from holo_jax.kernels.hopper import backend as hopper
from holo_jax.layers import Linear, Normalization
from holo_jax.mixers.context import Context
from holo_jax.mixers.memory import MemoryMixer
from holo_jax.ordered_sums import signalled
from holo_jax.parallel import sequence_axis, whole
from holo_jax.residual import Pending, added, summands

# Rows of float32 begin at lines of memory, 128 bytes: off them features take a quarter longer; operands of
# products off 16 bytes are copied.
_ALIGNED = 32


def unsupported(mixer: MemoryMixer, x: Array, context: Context) -> str | None:
    """Why ``mix`` cannot stand in for the mixer on this input, or None."""
    config = mixer.config
    if not kernels.block.uses(config.products_backend, "mixer"):
        return f"block_backend is {config.block_backend!r}"
    for name, wanted in (
        ("binding", "outer"),
        ("addressing", "content"),
        ("write_gate", True),
        ("output_gate", True),
        ("head_norm", True),
        ("value_conv", 0),
    ):
        if getattr(config, name) != wanted:
            return f"{name} is {getattr(config, name)!r}; it must be {wanted!r}"
    if config.read_scale == "sqrt_time":
        return "the retrieval scale is 'sqrt_time'; it must be 'none' or 'sqrt_writes'"
    if not 2 <= config.short_conv <= 8:
        return f"short_conv is {config.short_conv}; it must be between 2 and 8"
    if sequence_axis() is not None:
        return "the sequence is divided over devices"
    if context.padding is not None or getattr(mixer, "joined", None) is not None:
        return "it reads on from a state"
    if x.dtype != jnp.dtype(config.precision.storage):
        return f"x has dtype {x.dtype}; it must be {config.precision.storage}"
    reason = kernels.block.mixer_unsupported(x, config.key_dim, config.head_dim)
    if reason is None and _kernel(mixer, x, context) not in ("hopper", "triton_outer"):
        reason = "the memory has no kernel that reads features or phases here"
    return reason


def _kernel(mixer: MemoryMixer, x: Array, context: Context) -> str:
    return kernels.choose(_call(mixer, x, context), mixer.config.memory_backend)


def _call(mixer: MemoryMixer, x: Array, context: Context) -> Call:
    config = mixer.config
    tokens = (*x.shape[:2], config.num_heads)
    phases: Any = jax.ShapeDtypeStruct((*tokens, config.key_dim), jnp.float32)
    gates: Any = jax.ShapeDtypeStruct(tokens, jnp.float32)
    values: Any = jax.ShapeDtypeStruct((*tokens, config.head_dim), x.dtype)
    return Call(
        phases,
        phases,
        values,
        gates,
        gates if config.erase else None,
        config.binding,
        config.memory_method,
        context.segment_ids,
        None,
        config.chunk_size or None,
    )


def after_norm(
    mixer: MemoryMixer,
    norm: Normalization,
    x: Float[Array, "b t e"],
    pending: Pending | None,
    context: Context,
) -> tuple[Float[Array, "b t e"], Float[Array, "b t e"]]:
    """x with what is pending, and the mixer of its norm, for inputs that ``unsupported`` accepts."""
    config = mixer.config
    narrow = ("write", "erase") if config.erase else ("write",)
    # Gates are a few columns each: they ride along with the phases, which have the same dtype.
    phases = jnp.concatenate([getattr(mixer, n).weight[...] for n in ("phases", *narrow)], axis=1)
    phases = whole(phases, mixer.phases.axes, config.precision.storage)
    phases = jnp.pad(phases, ((0, 0), (0, -phases.shape[1] % _ALIGNED)))
    weights = (mixer.values.whole_weight, mixer.gate.whole_weight, phases)
    dtypes = (x.dtype, x.dtype, jnp.dtype(config.precision.phases))
    if norm.fuses(x):
        x, products = kernels.block.normed_products(
            x, *summands(pending), *norm.parameters, weights, dtypes=dtypes, eps=norm.eps
        )
    else:
        x = added(x, pending)
        rows = norm(x)
        products = tuple(
            jnp.einsum("bti,io->bto", rows, w.astype(x.dtype), preferred_element_type=dtype)
            for w, dtype in zip(weights, dtypes, strict=True)
        )
    return x, _mix(mixer, context, *products)


def _mix(mixer: MemoryMixer, context: Context, values: Array, gate: Array, raw: Array) -> Array:
    """From the maps of the input, where ``raw`` holds the phases and then the gates."""
    config = mixer.config
    b, t, _ = values.shape
    h, m = config.num_heads, config.key_dim
    if context.signal is not None:
        raw = signalled(raw, context.signal)
    taps = config.phase_scale * jnp.stack([mixer.write_taps[...], mixer.read_taps[...]])
    inside = None if context.segment_ids is None else context.inside.astype(jnp.int32)
    bias = jnp.stack([_bias(mixer.write), _bias(mixer.erase)] if config.erase else [_bias(mixer.write)])
    heads = values.reshape(b, t, h, -1)
    if _kernel(mixer, values, context) == "triton_outer":
        retrieved, opened = kernels.convolved_sum(raw, taps, bias, heads, inside, context.segment_ids)
    else:
        # A sum takes its write gates in the keys: a pass over values less each way. The delta rule cannot.
        folded = not config.erase
        keys, queries, (opened, *rest) = kernels.block.convolved_features(
            raw, taps, bias, inside, m=m, dtype=values.dtype, gated=folded
        )
        gates = jnp.swapaxes(opened, 1, 2)
        erase = gates * jnp.swapaxes(rest[0], 1, 2) if rest else None
        call = _call(mixer, values, context)._replace(values=heads, gates=gates, erase=erase)
        retrieved, _ = hopper.accumulate_features(
            keys, queries, call, scaled=kernels.block.scaled_heads, gated=folded, final=False
        )
    factors = None
    if config.read_scale == "sqrt_writes":
        factors = kernels.block.write_factors(opened, inside)
    return kernels.block.gated_product(
        retrieved, factors, gate, mixer.head_norm.weight[...], mixer.out.whole_weight, eps=config.norm_eps
    )


def _bias(linear: Linear) -> Array:
    assert linear.bias is not None
    return linear.bias[...].astype(jnp.float32)
