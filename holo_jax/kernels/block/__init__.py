"""The parts of a block around its products and its memory, each as one pass over memory each way.

Products themselves are left to the compiler. What lies between them is here: residual sum and norm, the
norm and gate after a retrieval, phases. Each function carries its own gradient, and the input of a product,
which the gradient of its weight needs, is made again by the kernel that passes over the same rows: it is
neither kept nor made by a pass of its own.

Every function works on NVIDIA GPUs from Ampere on and in Pallas' interpreter elsewhere; ``unsupported`` says
where it does not.
"""

from holo_jax.kernels.block.denoisers import normed_gelu, normed_swiglu
from holo_jax.kernels.block.mixer import convolved_features, gated_product, scaled_heads, write_factors
from holo_jax.kernels.block.norms import normed, normed_products
from holo_jax.kernels.block.support import mixer_unsupported, unsupported, uses

__all__ = [
    "convolved_features",
    "gated_product",
    "mixer_unsupported",
    "normed",
    "normed_gelu",
    "normed_products",
    "normed_swiglu",
    "scaled_heads",
    "unsupported",
    "uses",
    "write_factors",
]
