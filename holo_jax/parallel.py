"""The device mesh as the model sees it: its axes by name, how parameters and activations lie on them.

The model runs on whatever mesh is ambient while it is traced (``on_mesh``, or ``jax.set_mesh``); without
one, or on a mesh of one device, nothing here leaves a trace in the program. What is element-wise is left to
the compiler, which needs to be told only where activations lie (``constrain``). What mixes tokens, calls
kernels or multiplies by a parameter is written per device (``sharded``), so that what is sent is what is
written: rows over ``data`` and ``fsdp``, time over ``seq``, heads over ``tensor``, and matrices gathered over
``fsdp`` where they are used (``whole``). Without ``tensor`` a device has whole tokens and runs whole blocks
on them (``divides_tokens``): the program of one device, its kernels included.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from holo_jax.array_types import Array
from holo_jax.exchange import Exchange, all_gather, all_reduce, reduce_scatter

DATA, FSDP, SEQ, TENSOR = MESH_AXES = ("data", "fsdp", "seq", "tensor")
BATCH_AXES = (DATA, FSDP)
Tree = Any

# Logical axis of a parameter -> mesh axis. A name missing here is an error, None is on no axis.
PARAMETER_AXES: Mapping[str, str | None] = {
    "layers": None,
    "embed": FSDP,
    "heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
}

_COPIES = frozenset(
    (
        "all_gather",
        "all_to_all",
        "convert_element_type",
        "broadcast_in_dim",
        "concatenate",
        "reshape",
        "transpose",
    )
)
GATHERED_NAME = (
    "gathered_weight"  # of weights to keep until the backward pass, for rematerialisation policies
)
ROUNDED_NAME = "rounded_weight"  # of weights in the dtype of the products, likewise
_EXCHANGE = contextvars.ContextVar("exchange", default=Exchange())  # noqa: B039 (frozen)
_ALONE = 2**20  # bytes from which a gradient is worth an exchange of its own
_LAYOUT: dict[str, Any] = {"b": BATCH_AXES, "t": SEQ, "h": TENSOR, "_": None}


def layout(names: str) -> P:
    """Mesh axes of an activation by dimension: ``b`` rows, ``t`` time, ``h`` heads or vocabulary, ``_`` none.

    Dimensions that are not named are whole on every device.
    """
    return P(*(_LAYOUT[name] for name in names.split()))


def parameter_layout(axes: tuple[str | None, ...]) -> P:
    """Mesh axes of a parameter from the names of its dimensions.

    A mesh axis may appear once: a later dimension of the same kind stays whole. Vectors are not divided over
    ``fsdp``: to gather so few numbers takes longer than to hold them saves.
    """
    vector = len([name for name in axes if name != "layers"]) < 2
    found: list[str | None] = []
    for name in axes:
        target = None if name is None else PARAMETER_AXES[name]
        found.append(None if target in found or (vector and target == FSDP) else target)
    return P(*found)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, exchange: Exchange = Exchange()) -> Iterator[None]:  # noqa: B008 (frozen)
    """Makes ``mesh`` the one that a model traced inside runs on, and ``exchange`` how its devices send."""
    with exchanging(exchange), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


@contextlib.contextmanager
def exchanging(exchange: Exchange) -> Iterator[None]:
    """Makes ``exchange`` how the devices of the ambient mesh send weights and gradients."""
    token = _EXCHANGE.set(exchange)
    try:
        yield
    finally:
        _EXCHANGE.reset(token)


def ambient_mesh() -> AbstractMesh | None:
    """The mesh to divide work over: the ambient one if it has the axes above and several devices.

    None inside a ``shard_map`` too, where the work has been divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return None if AxisType.Manual in mesh.axis_types else mesh


def ambient_exchange() -> Exchange:
    """How the devices of the ambient mesh send (``on_mesh``)."""
    return _EXCHANGE.get()


def divides_tokens() -> bool:
    """Whether an ambient mesh divides rows and time only, so that every device can run whole blocks."""
    mesh = ambient_mesh()
    return mesh is not None and mesh.shape[TENSOR] == 1


def sequence_axis() -> str | None:
    """``"seq"`` where this code runs per device on a part of the sequence, None where it sees all of it."""
    return _divided(SEQ)


def tensor_axis() -> str | None:
    """``"tensor"`` where this code runs per device on a part of the heads or vocabulary, else None."""
    return _divided(TENSOR)


def _divided(axis: str) -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axis not in mesh.axis_names or mesh.shape[axis] == 1:
        return None
    manual = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis] == AxisType.Manual
    return axis if manual else None


def whole(weight: Array, axes: tuple[str | None, ...], dtype: Any) -> Array:
    """A device's part of a parameter in one piece along ``fsdp``; itself where nothing is divided along it.

    For use inside ``sharded``, by products whose operands have ``dtype``: the parts are rounded to it before
    they are sent, which halves what bfloat16 products gather. The result has the parameter's dtype, and so
    has its gradient, which is summed over ``fsdp`` and divided again in one exchange (``holo_jax.exchange``).

    Args:
      weight: this device's part of the float32 master.
      axes: logical names of its dimensions.
      dtype: of the products.
    """
    spec = parameter_layout(axes)
    if _divided(FSDP) is None or FSDP not in spec:
        return weight
    return _gathered(weight, spec.index(FSDP), jnp.dtype(dtype), _EXCHANGE.get())


def rounded_once(weight: Array, axes: tuple[str | None, ...], dtype: Any) -> Array:
    """``whole``, and where nothing is gathered the weight rounded to ``dtype`` under ``ROUNDED_NAME``.

    Rematerialisation that keeps it neither slices a stack of masters nor rounds anew going back. The result
    and its gradient have the parameter's dtype.
    """
    if _divided(FSDP) is None or FSDP not in parameter_layout(axes):
        return _rounded_once(weight, jnp.dtype(dtype))
    return whole(weight, axes, dtype)


def _rounded(weight: Array, dtype: Any) -> Array:
    return checkpoint_name(weight.astype(dtype), ROUNDED_NAME).astype(weight.dtype)


_rounded_once = jax.custom_vjp(_rounded, nondiff_argnums=(1,))
# The forward rule rounds by itself: inside of another such call the name is hidden from a policy.
_rounded_once.defvjp(
    lambda weight, dtype: (_rounded(weight, dtype), None), lambda dtype, _, gradient: (gradient,)
)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(weight: Array, dimension: int, dtype: Any, exchange: Exchange) -> Array:
    return _gathered_fwd(weight, dimension, dtype, exchange)[0]


def _gathered_fwd(weight: Array, dimension: int, dtype: Any, exchange: Exchange) -> tuple[Array, None]:
    parts = all_gather(weight.astype(dtype), FSDP, dimension, exchange)
    if not exchange.reshard_after_forward:
        parts = checkpoint_name(parts, GATHERED_NAME)
    return parts.astype(weight.dtype), None


def _gathered_bwd(dimension: int, dtype: Any, exchange: Exchange, _: None, gradient: Array) -> tuple[Array]:
    return (reduce_scatter(gradient, FSDP, dimension, exchange),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


@jax.custom_vjp
def summed_over_tensor(x: Array) -> Array:
    """The sum over ``tensor`` of what its devices found, inside ``sharded``; itself where it is not divided.

    Every device receives the same sum, and with it the same gradient, so going back needs no exchange. The
    transposed ``lax.psum`` would make one: ``jax.shard_map`` hands each of n devices 1/n of the gradient of a
    result that they share, for such sums to add up again.
    """
    return _summed_fwd(x)[0]


def _summed_fwd(x: Array) -> tuple[Array, None]:
    axis = tensor_axis()
    return x if axis is None else lax.psum(x, axis), None


def _summed_bwd(_: None, gradient: Array) -> tuple[Array]:
    axis = tensor_axis()
    return (gradient if axis is None else gradient * lax.axis_size(axis),)


summed_over_tensor.defvjp(_summed_fwd, _summed_bwd)


def constrain(x: Array, names: str) -> Array:
    """Says where an activation lies; see ``layout``."""
    return x if ambient_mesh() is None else lax.with_sharding_constraint(x, layout(names))


def sharded(function: Callable[..., Any], arguments: Tree, results: Tree) -> Callable[..., Any]:
    """``function`` run once per device on its part of every argument; itself without a mesh.

    Args:
      function: of arrays (or trees, or None) alone; whatever it closes over must not be traced.
      arguments: a layout for each argument, or a tree of layouts that is a prefix of it.
      results: the same of the result. A result that does not name an axis must be equal along it.

    Kernels and collectives are allowed inside, so the compiler's own check of the last condition is off.
    An argument that does not name ``data`` receives gradients summed over it: by the compiler, or, where
    ``Exchange`` says otherwise, a large matrix as that says.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return function
    exchange = _EXCHANGE.get()
    plain = (exchange.reduce_dtype, exchange.transport) == ("float32", "collectives")
    if plain or mesh.shape[DATA] == 1:
        return jax.shard_map(function, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)

    def run(*given: Any) -> Any:
        leaves, tree = jax.tree.flatten(given)
        every = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part), arguments, given, is_leaf=_is_spec
        )
        specs = jax.tree.leaves(every, is_leaf=_is_spec)
        own = [_summed_alone(leaf, spec, mesh) for leaf, spec in zip(leaves, specs, strict=True)]
        lead = [
            _replicas(leaf, spec, exchange) if alone else leaf
            for leaf, spec, alone in zip(leaves, specs, own, strict=True)
        ]
        at = [P(DATA, *spec) if alone else spec for spec, alone in zip(specs, own, strict=True)]

        def each(*parts: Any) -> Any:
            whole = [part[0] if alone else part for part, alone in zip(parts, own, strict=True)]
            return function(*jax.tree.unflatten(tree, whole))

        return jax.shard_map(each, mesh=mesh, in_specs=tuple(at), out_specs=results, check_vma=False)(*lead)

    return run


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def _summed_alone(leaf: Array, spec: P, mesh: AbstractMesh) -> bool:
    """Whether an argument of ``sharded`` is a large matrix that is the same along ``data``."""
    named = {name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,))}
    divided = math.prod(mesh.shape[name] for name in named if name is not None)
    large = leaf.size // divided * leaf.dtype.itemsize >= _ALONE
    return DATA not in named and leaf.ndim == 2 and large and jnp.issubdtype(leaf.dtype, jnp.floating)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _replicas(weight: Array, spec: P, exchange: Exchange) -> Array:
    """``[data, ...]`` from a weight that is the same along ``data``: nothing is sent, its gradient is."""
    return over_data(lambda w: w[None], spec, P(DATA, *spec))(weight)


def _replicas_fwd(weight: Array, spec: P, exchange: Exchange) -> tuple[Array, None]:
    return _replicas(weight, spec, exchange), None


def _replicas_bwd(spec: P, exchange: Exchange, _: None, gradient: Array) -> tuple[Array]:
    return (over_data(lambda g: all_reduce(g[0], DATA, exchange), P(DATA, *spec), spec)(gradient),)


_replicas.defvjp(_replicas_fwd, _replicas_bwd)


def sent_alone(gradient: Array) -> bool:
    """Whether a device's gradient is a matrix large enough for an exchange of its own."""
    return gradient.ndim == 2 and gradient.size * gradient.dtype.itemsize >= _ALONE


def over_data(function: Callable[[Any], Any], at: P, to: P) -> Callable[[Any], Any]:
    """``function`` of one device's part on the ambient mesh, arguments ``at`` and results ``to``."""
    mesh = ambient_mesh()
    assert mesh is not None
    return jax.shard_map(function, mesh=mesh, in_specs=(at,), out_specs=to, check_vma=False)


def asked_where_blocks_run(question: Callable[[Array], bool], x: Array) -> bool:
    """The answer of what runs a block (a device of ``divides_tokens``) about its part of ``[b, t, ...]``."""
    if not divides_tokens():
        return question(x)
    answers = []

    def ask(part: Array) -> Array:
        answers.append(question(part))
        return part

    jax.eval_shape(sharded(ask, (layout("b t"),), layout("b t")), x)
    return answers[0]


def gathering_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for ``sharded``, which gathers again (``whole``) when it is differentiated.

    For products outside of any ``jax.checkpoint``: they would keep the gathered weights of every layer.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.shape[FSDP] == 1:
        return function
    return jax.checkpoint(function, policy=_not_gathered)


def _not_gathered(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    """A rematerialisation policy: everything but what is gathered, and its copies in other forms."""
    del avals, parameters
    return primitive.name not in _COPIES


def check_divides(batch: int, time: int) -> None:
    """Checks that rows and time divide over the ambient mesh.

    Raises:
      ValueError: with the sizes.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch % ways:
        raise ValueError(
            f"the batch has {batch} rows; it must be a multiple of data x fsdp = {ways} of the mesh"
        )
    if time % mesh.shape[SEQ]:
        raise ValueError(
            f"the batch has {time} tokens a row; it must be a multiple of seq = {mesh.shape[SEQ]}"
        )
