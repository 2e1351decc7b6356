"""Inverse of a unit lower triangular matrix, by recursive 2x2 block inversion."""

import jax
import jax.numpy as jnp
from jax import lax

from holo_jax.array_types import Array, Float


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _invert(strict: Array) -> Array:
    """Inverse of ``I + strict`` for a size that is a power of two."""
    size = strict.shape[-1]
    if size == 1:
        return jnp.ones_like(strict)
    half = size // 2
    # Both diagonal blocks in one batch: the depth is log2(size) and so is the number of products.
    diagonal = _invert(jnp.stack([strict[..., :half, :half], strict[..., half:, half:]]))
    upper, lower = diagonal[0], diagonal[1]
    corner = -_matmul(lower, _matmul(strict[..., half:, :half], upper))
    top = jnp.concatenate([upper, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)


@jax.custom_vjp
def unit_lower_inverse(strict: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """``(I + L)^{-1}`` of a strictly lower triangular ``L``; what lies on or above the diagonal is not read.

    ``[[A, 0], [C, B]]^{-1} = [[A', 0], [-B' C A', B']]``, recursively. Every intermediate is a block of the
    inverse or one product away from it. The Neumann product ``(I - L)(I + L^2)(I + L^4)...`` goes through
    powers of L, which overflow when keys are equal. Zero blocks stay exactly zero.

    Gradient: ``dL = -tril((I + L)^{-T} G (I + L)^{-T}, -1)``.
    """
    size = strict.shape[-1]
    padding = (1 << (size - 1).bit_length()) - size
    if padding:
        strict = jnp.pad(strict, [(0, 0)] * (strict.ndim - 2) + [(0, padding)] * 2)
    return _invert(strict)[..., :size, :size]


def _inverse_fwd(strict: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(strict)
    return inverse, inverse


def _inverse_bwd(inverse: Array, cotangent: Array) -> tuple[Array]:
    transpose = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_matmul(transpose, _matmul(cotangent, transpose)), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
