"""The outer memory on NVIDIA Hopper by the kernels of jax-linear-attention (optional extra ``kernels``).

For real values the outer memory is linear attention without decay over the features
``phi(a) = [cos a, sin a] / sqrt(m)`` with the real state ``S = [Re M; Im M]``:

* without erase, ``S_t = S_{t-1} + phi(a_t) (g_t v_t)^T``: the scalar-decay kernel with decay 1;
* with erase, ``S_t = S_{t-1} + phi(a_t) (g_t v_t - e_t S_{t-1}^T phi(a_t))^T``: the delta-rule kernel with
  strength ``e_t`` and values ``(g_t / e_t) v_t``.

Products have bfloat16 (or float16) operands and float32 accumulators and states; features, written values
and outputs are rounded to the dtype of the values. The sum over chunks is not compensated, so the returned
residue is zero.

Source: https://github.com/jla-org/jax-linear-attention (Apache-2.0), version 0.1.0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from holo_jax.array_types import Array
from holo_jax.functional import MemoryState
from holo_jax.kernels.call import READ_NAME, Call, total_writes
from holo_jax.kernels.capability import compute_capability, installed_version, partitioned
from holo_jax.kernels.hopper import erase as hopper_erase
from holo_jax.kernels.hopper import stages as hopper_stages
from holo_jax.kernels.hopper.stages import CHUNK
from holo_jax.kernels.phasor_features import phasor_features

VERSION = "0.1.0"
COVERS = "outer memory with bfloat16 values on Hopper, by jax-linear-attention"
_MAX_CHUNKS = 65535
_WIDTHS = (64, 128)
# Erase gates below this share of the write gate are raised to it, so that g / e stays finite: the memory
# then loses 1.5e-5 of what a key reads, far under the rounding of the 16-bit operands (4e-3).
_LEAST_SHARE = 2.0**-16
_LEAST = 2.0**-100


def missing() -> str | None:
    """Why no call at all can run here, or None."""
    version = installed_version("jla", "jax-linear-attention")
    if version is None:
        return "jax-linear-attention is not installed (pip install 'holo-jax[kernels]'; Python 3.12 or newer)"
    if version != VERSION:
        return f"jax-linear-attention is {version}; it must be {VERSION}"
    capability = compute_capability()
    if capability != (9, 0):
        return "its kernels need an NVIDIA Hopper GPU (compute capability 9.0)"
    return None


def unsupported(call: Call) -> str | None:
    """Why this call cannot run here, or None. Expects a well-formed call."""
    reason = missing()
    if reason is not None:
        return reason
    t, d, m = call.values.shape[1], call.values.shape[-1], call.write_phases.shape[-1]
    if call.binding != "outer":
        return f"binding is {call.binding!r}; it must be 'outer'"
    if call.method != "chunked":
        return f"method is {call.method!r}; it must be 'chunked'"
    if call.chunk_size not in (None, CHUNK):
        return f"chunk_size is {call.chunk_size}; it must be {CHUNK}"
    if call.values.dtype not in (jnp.bfloat16, jnp.float16):
        return f"values has dtype {call.values.dtype}; it must be bfloat16 or float16"
    if 2 * m not in _WIDTHS or d not in _WIDTHS:
        return f"m is {m} and d is {d}; 2 m and d must be 64 or 128"
    if -(-t // CHUNK) > _MAX_CHUNKS:
        return f"t is {t}; it must be at most {_MAX_CHUNKS * CHUNK}"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def accumulate(
    call: Call, *, rule: str = "deltanet", implementation: str = "mosaic_gpu"
) -> tuple[Array, MemoryState]:
    """The same as ``holo_jax.functional.accumulate``, for a call that ``unsupported`` accepts.

    Args:
      call: the arguments.
      rule: kernel of the erase form: ``"deltanet"``, or ``"gdn2"``, whose erase and write gates are
        separate (twice the bytes, no quotient of gates).
      implementation: ``"mosaic_gpu"``, or the package's plain ``"chunked"`` or ``"reference"`` form, which
        run anywhere and serve to test this mapping.
    """
    keys, queries = features(call)
    outputs, state = accumulate_features(keys, queries, call, rule=rule, implementation=implementation)
    assert state is not None
    return outputs.astype(jnp.float32), state


def accumulate_features(
    keys: Array,
    queries: Array,
    call: Call,
    *,
    rule: str = "deltanet",
    implementation: str = "mosaic_gpu",
    scaled: Callable[[Array, Array], Array] | None = None,
    gated: bool = False,
    final: bool = True,
) -> tuple[Array, MemoryState | None]:
    """``accumulate`` given the features ``[b, t, h, 2 m]`` of its phases, which are not read themselves.

    Outputs have the dtype of the values. ``scaled`` multiplies values by a factor a head; plain JAX if None.
    ``gated`` says that the keys are multiplied by the write gates already, so that values are not: the sum's
    terms ``phi (g v)^T`` and ``(g phi) v^T`` are the same. The delta rule needs keys of norm 1. Without
    ``final`` there is no state, and the delta rule goes back by a kernel of our own (``erase``), which
    scales values itself.
    """
    assert not (gated and call.erase is not None)
    scaled = scaled or hopper_stages.scaled
    from jla.ops import linear_attention

    options: dict[str, Any] = dict(scale=1.0, output_final_state=final, impl=implementation)
    if call.segment_ids is not None:
        options["segment_ids"] = call.segment_ids
    if call.initial_state is not None:
        held = call.initial_state.memory + call.initial_state.residue
        options["initial_state"] = jnp.concatenate([held.real, held.imag], axis=-2)
    if call.erase is None:
        values = call.values if gated or call.gates is None else scaled(call.values, _gates(call))
        outputs, state = _sum(queries, keys, values, implementation, options)
    elif rule == "gdn2":
        outputs, state = linear_attention(
            "gdn2",
            queries,
            keys,
            call.values,
            g=jnp.zeros(keys.shape, jnp.float32),
            b=jnp.broadcast_to(call.erase[..., None], keys.shape),
            w=jnp.broadcast_to(_gates(call)[..., None], call.values.shape),
            **options,
        )
    else:
        if implementation == "mosaic_gpu" and hopper_erase.unsupported(call, final=final) is None:
            gates, strength = _gates(call), _strength(call)
            outputs = hopper_erase.read(queries, keys, call.values, gates, strength, call.segment_ids)
        else:
            values, strength = delta_operands(call, scaled)
            outputs, state = linear_attention("deltanet", queries, keys, values, beta=strength, **options)
    # Named while narrow, so that a rematerialised block keeps it instead of running the kernel twice.
    outputs = checkpoint_name(outputs, READ_NAME)
    if not final:
        return outputs, None
    real, imag = jnp.split(state, 2, axis=-2)
    memory = jax.lax.complex(real, imag)
    return outputs, MemoryState(memory, jnp.zeros_like(memory), total_writes(call))


def delta_operands(call: Call, scaled: Callable[[Array, Array], Array] | None = None) -> tuple[Array, Array]:
    """(values, strength) that the delta-rule kernel is given for a call with ``erase``."""
    strength = _strength(call)
    return (scaled or hopper_stages.scaled)(call.values, _gates(call) / strength), strength


def _strength(call: Call) -> Array:
    assert call.erase is not None
    return raised(call.erase.astype(jnp.float32), _gates(call))


def features(call: Call) -> tuple[Array, Array]:
    """Of the keys and of the queries, for every row."""
    b, t, h, _ = call.values.shape
    keys, queries = (
        jnp.broadcast_to(phasor_features(p, call.values.dtype), (b, t, h, 2 * p.shape[-1]))
        for p in (call.write_phases, call.read_phases)
    )
    return keys, queries


def _gates(call: Call) -> Array:
    if call.gates is None:
        return jnp.ones(call.values.shape[:3], jnp.float32)
    return call.gates.astype(jnp.float32)


def _sum(
    queries: Array, keys: Array, values: Array, implementation: str, options: dict[str, Any]
) -> tuple[Array, Array]:
    """The scalar-decay form with decay 1."""
    if implementation != "mosaic_gpu":
        from jla.ops import linear_attention

        none = jnp.zeros(values.shape[:3], jnp.float32)
        return linear_attention("simple_gla", queries, keys, values, g=none, **options)
    # The kernel's own entry, which takes no decay at all: the public one sums given zeros over each chunk, a
    # constant that XLA folds for up to 20 s a program.
    from jla.ops.mosaic_gpu import scalar_gate

    given = {name: value for name, value in options.items() if name != "impl"}
    reason = scalar_gate.unsupported_reason(queries, keys, values, (), given, delta=False)
    if reason is not None:
        raise ValueError(f"values cannot be summed by the kernel of jax-linear-attention: {reason}")
    return scalar_gate.run(
        queries, keys, values, None, None, delta=False, **({"initial_state": None} | given)
    )


def raised(erase: Array, gates: Array) -> Array:
    """Erase gates not below ``2^-16`` of the write gates, with the gradient of the erase gates themselves.

    By the package's kernel the gradient with respect to ``e`` is a difference of two products, each known to
    the operands' rounding (``erase`` has one product); through a gate ``e = g sigmoid(x)`` the error
    it leaves in ``dx`` is at most that rounding times the gradient of the write gate, however small ``e`` is.
    """
    least = jnp.maximum(_LEAST_SHARE * gates, _LEAST)
    return erase + jax.lax.stop_gradient(jnp.maximum(erase, least) - erase)
