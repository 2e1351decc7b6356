"""Where the kernels of a block can run, and how their functions carry gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array
from holo_jax.kernels.capability import compute_capability, partitioned, triton_missing

# What each value of ``block_backend`` may use. "products" are denoiser and loss by jax-linear-attention.
_USES = {
    "portable": (),
    "auto": ("products", "norms", "mixer"),
    "products": ("products",),
    "norms": ("products", "norms"),
    "mixer": ("products", "mixer"),
}
_TOKENS = 64
_WIDTHS = (128, 256, 512, 1024, 2048, 4096)
_HEADS = (16, 32, 64, 128)


def uses(backend: str, kind: str) -> bool:
    """Whether a backend may use kernels of a kind: ``products``, ``norms`` or ``mixer``."""
    return kind in _USES[backend]


def unsupported(x: Array) -> str | None:
    """Why rows ``[b, t, e]`` cannot be normed by these kernels, or None."""
    reason = _unsupported_here(x)
    if reason is None and x.shape[-1] not in _WIDTHS:
        reason = f"the width is {x.shape[-1]}; it must be one of {', '.join(map(str, _WIDTHS))}"
    return reason


def mixer_unsupported(x: Array, m: int, d: int) -> str | None:
    """Why a mixer with heads of m phasors and d channels cannot use these kernels, or None."""
    reason = _unsupported_here(x)
    for name, width in (("m", m), ("d", d)):
        if reason is None and width not in _HEADS:
            reason = f"{name} is {width}; it must be one of {', '.join(map(str, _HEADS))}"
    return reason


def _unsupported_here(x: Array) -> str | None:
    reason = triton_missing()
    if reason is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x has dtype {x.dtype}; it must be bfloat16, float16 or float32"
    if x.shape[0] * x.shape[1] % _TOKENS:
        return f"x has {x.shape[0] * x.shape[1]} rows; they must be a multiple of {_TOKENS}"
    if partitioned():
        return "the computation spans several devices; call it inside jax.shard_map"
    return None


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter, for want of a card."""
    return compute_capability() is None


def op(run: Any) -> Any:
    """``run`` with a gradient of its own, whose forward rule has to call ``run`` itself.

    Inside of another such call kernels and products would be hidden from a rematerialisation policy.
    """
    return jax.custom_vjp(run, nondiff_argnums=(0,))
