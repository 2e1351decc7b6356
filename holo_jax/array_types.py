"""Axis letters and array aliases used in every signature of the package.

Glossary (one letter, one meaning):

    b  batch row                    h  head
    t  time (token position)        m  phasor component of a key
    c  position inside a chunk      d  value channel of a head
    n  chunk                        e  hidden (residual) channel
    l  layer                        v  vocabulary entry
    s  key position of a cache      k  tap of a short convolution

Annotations such as ``Float[Array, "b t h d"]`` are documentation at run time; the test suite
turns them into checks through an import hook.
"""

from jax import Array
from jaxtyping import Bool, Complex, Float, Int, Shaped, UInt32

__all__ = ["Array", "Bool", "Complex", "Float", "Int", "Shaped", "UInt32"]
