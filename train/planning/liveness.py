"""The most bytes that a traced function holds at one time beside its arguments, run in the order traced.

Element-wise steps and changes of form are taken to be fused into what reads them: only what a product, a sum,
a loop or the result needs is written to memory. Updates of a slice happen in place.
"""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_WRITTEN = frozenset(
    (
        "dot_general",
        "scan",
        "while",
        "cond",
        "sort",
        "gather",
        "scatter",
        "scatter-add",
        "concatenate",
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_and",
        "reduce_or",
        "reduce",
        "argmax",
        "cumsum",
        "cummax",
        "cumlogsumexp",
        "all_gather",
        "all_to_all",
        "reduce_scatter",
        "psum",
        "ppermute",
        "custom_jvp_call",
        "custom_vjp_call",
        "jit",
        "pjit",
        "remat2",
        "checkpoint",
    )
)
_IN_PLACE = frozenset(("dynamic_update_slice",))


def live_bytes(jaxpr: Jaxpr) -> int:
    """Largest sum of the arrays that are written and still needed, those in loops and calls included.

    Args:
      jaxpr: of the function as traced; inside of ``shard_map`` shapes are those of one device.

    Returns:
      Bytes, without the arguments and constants.
    """
    last: dict[Any, int] = {}
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for index, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, Literal):
                last[v] = index
                if eqn.primitive.name in _WRITTEN:
                    needed.add(v)
    # What is fused reads its sources as late as what it is fused into.
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        if eqn.primitive.name in _WRITTEN | _IN_PLACE:
            continue
        end = max((last.get(v, index) for v in eqn.outvars if v not in needed), default=index)
        for v in eqn.invars:
            if not isinstance(v, Literal):
                last[v] = max(last[v], end)
    forever = len(jaxpr.eqns)
    last |= {v: forever for v in jaxpr.outvars if not isinstance(v, Literal)}
    ends: dict[int, int] = {}
    live = peak = 0
    for index, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        made = 0
        for v in eqn.outvars:
            if (name in _WRITTEN or v in needed) and name not in _IN_PLACE and v in last:
                aval: Any = v.aval
                size = aval.size * aval.dtype.itemsize
                made += size
                ends[last[v]] = ends.get(last[v], 0) + size
        live += made
        inside = max((live_bytes(sub) for sub in _inner(eqn)), default=0)
        peak = max(peak, live + inside)
        live -= ends.pop(index, 0)
    return peak


def _inner(eqn: Any) -> list[Jaxpr]:
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, Jaxpr):
                found.append(one)
    return found
