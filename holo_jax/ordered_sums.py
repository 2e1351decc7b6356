"""Gradients over ``data`` summed in an order of their own: each part's while the part before it runs back.

Left to the compiler, sums follow the whole backward pass with little beside them. Here the order is said with
barriers: the gradients of a part of the model are computed (``known_together``), and summed while what lies
before it runs back (``summed_meanwhile``), from where on that says so (``signalled``).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec as P

from holo_jax.array_types import Array
from holo_jax.exchange import Exchange, all_reduce, all_reduce_parts, apart, side_by_side
from holo_jax.parallel import DATA, Tree, ambient_exchange, ambient_mesh, over_data, sent_alone


def sums_alone() -> bool:
    """Whether gradients are summed in order, over ``data`` alone (``summed_meanwhile``)."""
    mesh = ambient_mesh()
    return ambient_exchange().in_order and mesh is not None and mesh.shape[DATA] == mesh.size


class Sums(NamedTuple):
    """What takes part in sums on the way back.

    Attributes:
      signal: ``[data]``; sums begin when its gradient is there (``signalled``).
      room: by copies, ``[data, ...]`` whose gradient are the gradients to be summed (``known_together``).
    """

    signal: Array
    room: Array | None


def summed_meanwhile(tree: Tree, stream: Tree, name: str) -> tuple[Tree, Tree, Sums]:
    """Parameters once a device, ``[data, ...]``, and ``stream``, on a mesh that ``sums_alone``.

    Nothing is sent forward, and functions ``sharded`` by ``P(DATA)`` take their own. Going back the gradients
    of this tree are summed, joined with each other and nothing else, and what goes back through ``stream``
    waits for the sums. So the part that lies between this call and the use of ``tree`` runs beside them, if
    ``known_together`` asks for its gradients first. Left to the compiler, sums follow the whole backward
    pass, with little beside them.

    A sum beside a kernel with a program for every multiprocessor makes that take two rounds. So that part may
    say with the signal (``signalled``, ``signalling``) from where on sums may begin. By copies, which hold no
    multiprocessor, gradients are sent before it, and the sums after it.

    Args:
      tree: arrays that are the same on every device, to be used later.
      stream: arrays between here and there, for ``known_together`` as well; None where nothing is to wait.
      name: of this tree alone.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts, stream, sums = _meanwhile(tuple(leaves), stream, name, ambient_exchange())
    return jax.tree.unflatten(structure, parts), stream, sums


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _meanwhile(leaves: tuple[Array, ...], stream: Tree, name: str, exchange: Exchange) -> Any:
    mesh = ambient_mesh()
    assert mesh is not None
    count, room = mesh.shape[DATA], None
    if stream is not None and exchange.transport == "copies":
        room = jax.eval_shape(lambda own: side_by_side(own, count, exchange)[None], leaves)
        room = jnp.zeros((count, *room.shape[1:]), room.dtype)
    return _each(leaves), stream, Sums(jnp.zeros(count), room)


def _meanwhile_fwd(leaves: tuple[Array, ...], stream: Tree, name: str, exchange: Exchange) -> Any:
    return _meanwhile(leaves, stream, name, exchange), None


def _meanwhile_bwd(name: str, exchange: Exchange, _: None, gradients: Any) -> Any:
    parts, stream, sums = gradients
    if exchange.transport == "copies":
        return _sums_by_copies(parts, stream, sums, exchange)
    return lax.optimization_barrier((_sums(_after(parts, sums.signal), name, exchange), stream))


def _after(parts: tuple[Array, ...], signal: Array) -> tuple[Array, ...]:
    """Parts whose smallest, and with it all that are joined to it, waits for the signal.

    A barrier would not do: the compiler drops what comes out of it unused. A large part alone does not wait.
    """
    least = min(range(len(parts)), key=lambda index: parts[index].size)

    def own(part: Array, signal: Array) -> Array:
        return jnp.where(jnp.isnan(signal[0]), signal[0], part)

    if sent_alone(parts[least][0]):
        return parts
    waiting = over_data(lambda given: own(*given), P(DATA), P(DATA))((parts[least], signal))
    return (*parts[:least], waiting, *parts[least + 1 :])


_meanwhile.defvjp(_meanwhile_fwd, _meanwhile_bwd)


@jax.custom_vjp
def signalled(x: Array, signal: Array) -> Array:
    """x as it is, inside ``sharded``; going back, its gradient being there is the signal, ``[1]``."""
    return x


def _signalled_fwd(x: Array, signal: Array) -> tuple[Array, None]:
    return x, None


def _signalled_bwd(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.ravel(gradient)[:1].astype(jnp.float32)


signalled.defvjp(_signalled_fwd, _signalled_bwd)


@jax.custom_vjp
def signalling(tree: Tree, signal: Array) -> Tree:
    """Arrays once a device as they are; going back, the gradient of the largest being there is the signal."""
    return tree


def _signalling_fwd(tree: Tree, signal: Array) -> tuple[Tree, None]:
    return tree, None


def _signalling_bwd(_: None, gradients: Tree) -> tuple[Tree, Array]:
    last = max(enumerate(jax.tree.leaves(gradients)), key=lambda item: (item[1].size, item[0]))[1]
    return gradients, over_data(lambda g: jnp.ravel(g)[:1].astype(jnp.float32), P(DATA), P(DATA))(last)


signalling.defvjp(_signalling_fwd, _signalling_bwd)


def known_together(tree: Tree, stream: Tree, room: Array | None) -> tuple[Tree, Tree]:
    """Both as they are; going back, ``stream`` waits for the gradients of ``tree`` to be computed.

    Where there is ``room`` of ``summed_meanwhile``, side by side in it.
    """
    return _together(tree, stream, room, ambient_exchange())


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _together(tree: Tree, stream: Tree, room: Array | None, exchange: Exchange) -> tuple[Tree, Tree]:
    return tree, stream


def _together_fwd(tree: Tree, stream: Tree, room: Array | None, exchange: Exchange) -> Any:
    return (tree, stream), room is not None


def _together_bwd(exchange: Exchange, has_room: bool, gradients: Any) -> Any:
    tree, stream = gradients
    if not has_room:
        return *lax.optimization_barrier((tree, stream)), None
    joined, stream = lax.optimization_barrier((_joined(jax.tree.leaves(tree), exchange), stream))
    return None, stream, joined


_together.defvjp(_together_fwd, _together_bwd)


def _joined(gradients: Sequence[Array], exchange: Exchange) -> Array:
    """Gradients ``[data, ...]``, those of a device side by side, ``[data, data, ...]``."""

    def own(gradients: Sequence[Array]) -> Array:
        return side_by_side([g[0] for g in gradients], lax.axis_size(DATA), exchange)[None]

    return over_data(own, P(DATA), P(DATA))(gradients)


def _each(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
    return over_data(lambda own: tuple(leaf[None] for leaf in own), P(), P(DATA))(leaves)


def _sums(parts: tuple[Array, ...], name: str, exchange: Exchange) -> tuple[Array, ...]:
    """Sums over ``data`` of gradients ``[data, ...]``, which the compiler joins with each other alone."""

    def own(parts: tuple[Array, ...]) -> tuple[Array, ...]:
        with set_xla_metadata(combiner_key=name):
            return tuple(
                all_reduce(g[0], DATA, exchange) if sent_alone(g[0]) else lax.psum(g[0], DATA) for g in parts
            )

    return over_data(own, P(DATA), P())(parts)


def _sums_by_copies(parts: tuple[Array, ...], stream: Tree, sums: Sums, exchange: Exchange) -> Any:
    """The same, sent side by side, and ``stream`` behind them.

    They are cut apart behind the barrier, where those who read them can do it.
    """
    joined = _joined(parts, exchange) if sums.room is None else sums.room

    def own(given: tuple[Array, Array]) -> Array:
        return all_reduce_parts(given[0][0], DATA, exchange, given[1][0])

    summed = over_data(own, P(DATA), P())((joined, sums.signal))
    summed, stream = lax.optimization_barrier((summed, stream))
    return apart(summed, [jax.ShapeDtypeStruct(g.shape[1:], g.dtype) for g in parts]), stream
