"""What forward and backward hold beside their arguments and results, by XLA's own account on CPU.

One complex64 trace of a hadamard memory, the state at every position of B2 T4096 D256, is 16 MiB. With the
cotangent of the outputs given, so that only the memory is measured, packed rows, float32 (jax 0.10.2):

    hadamard B2 T4096 H1 D256     associative_scan  96.0 MiB (6.0 traces)      chunked   2.8 MiB (0.17)
    outer B2 T1024 H4 M64 D64     associative_scan 2570 MiB (10.0 traces)      chunked  24.8 MiB (0.10)
    outer B2 T4096 H4 M64 D64                                                  chunked  27.8 MiB (0.03)
    the same with erase                                                        chunked  40.3 MiB (0.04)

The numbers are those of ``temporary_bytes`` below.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from holo_jax.functional import accumulate
from tests.functional.cases import FAST_COMPILE

pytestmark = pytest.mark.cpu  # the bounds are for that compiler's plan


def temporary_bytes(binding, method, shape, erases=False):
    """Compiled scratch memory of outputs and all gradients; ``shape`` is (b, t, h, m, d). Nothing is run."""
    b, t, h, m, d = shape
    float32 = {
        "write": (b, t, h, m),
        "read": (b, t, h, m),
        "values": (b, t, h, d),
        "gates": (b, t, h),
        "cotangent": (b, t, h, d),
    }
    if erases:
        float32["erase"] = (b, t, h)
    arguments = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in float32.items()}
    segments = jax.ShapeDtypeStruct((b, t), jnp.int32)

    def train(x, segments):
        def forward(write, read, values, gates, erase):
            result = accumulate(
                write, read, values, gates, erase, binding=binding, method=method, segment_ids=segments
            )
            return result[0]

        outputs, pull = jax.vjp(forward, x["write"], x["read"], x["values"], x["gates"], x.get("erase"))
        return outputs, pull(x["cotangent"])

    # LLVM options leave the buffers alone and halve the time.
    compiled = jax.jit(train, compiler_options=FAST_COMPILE).lower(arguments, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def trace_bytes(shape, binding):
    """One complex64 state per position."""
    b, t, h, m, d = shape
    return 8 * math.prod((b, t, h, m, d) if binding == "outer" else (b, t, h, d))


def test_hadamard_holds_no_trace():
    shape = (2, 4096, 1, 256, 256)
    trace = trace_bytes(shape, "hadamard")
    naive = temporary_bytes("hadamard", "associative_scan", shape)
    chunked = temporary_bytes("hadamard", "chunked", shape)
    assert naive > 4 * trace
    assert chunked < trace / 4


@pytest.mark.parametrize("erases", [False, True])
def test_outer_holds_a_fraction_of_a_trace(erases):
    """A trace of B2 T4096 H4 M64 D64 would be 1 GiB; the transient arrays of one block are what is left."""
    shape = (2, 4096, 4, 64, 64)
    assert temporary_bytes("outer", "chunked", shape, erases) < trace_bytes(shape, "outer") / 16


def test_scratch_grows_by_states_not_by_positions():
    """From T to 4 T: one state per further block, far below one value per further position."""
    short, long = (temporary_bytes("outer", "chunked", (1, t, 2, 16, 16)) for t in (2048, 8192))
    assert long - short < 4 * (8192 - 2048) * 2 * 16
