"""The train state and the jitted functions on it: initialise, one optimizer step, one evaluation batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from holo_jax.array_types import Array
from holo_jax.exchange import Exchange
from holo_jax.parallel import on_mesh
from train.compilation import compiler_options
from train.model_functions import ModelFunctions, Params
from train.sharding import batch_sharding, optimizer_shardings, parameter_shardings, replicated

Batch = dict[str, Array]


class TrainState(NamedTuple):
    """Everything the next step depends on, besides its batch.

    Attributes:
      step: steps done, skipped ones included, int32 [].
      params: float32 masters.
      opt_state: optax state.
      rng: threefry key data, uint32 [2]; a new one each step.
      skipped: steps skipped for a non-finite loss or gradient, int32 [].
      nonfinite_run: how many of the last steps in a row were skipped, int32 [].

    The same shape of tree also holds the arrays' shapes and shardings.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any
    skipped: Any
    nonfinite_run: Any


class StepMetrics(NamedTuple):
    """Scalars of one step; ``skipped`` is 1 if loss or gradient was not finite and nothing was updated."""

    loss: Array
    grad_norm: Array
    learning_rate: Array
    num_targets: Array
    skipped: Array
    nonfinite_run: Array


class StepFunctions(NamedTuple):
    """Jitted functions and the shardings they agree on.

    Attributes:
      init: seed key data uint32 [2] -> TrainState, equal on any mesh.
      train: (TrainState, batch) -> (TrainState, StepMetrics); the state is donated.
      evaluate: (params, batch) -> (summed nats, number of targets).
      shapes, shardings: TrainState of ``jax.ShapeDtypeStruct`` and of ``NamedSharding``.
    """

    init: Callable[[Array], TrainState]
    train: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Params, Batch], tuple[Array, Array]]
    shapes: TrainState
    shardings: TrainState


def make_step_functions(
    functions: ModelFunctions,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    exchange: Exchange = Exchange(),  # noqa: B008 (frozen)
) -> StepFunctions:
    """Builds and shards the step.

    A batch is ``dict(tokens, segment_ids)``, int32 [a, b, t]: the a parts are computed one after the
    other and their gradients summed in float32, so the loss is the exact mean over all targets of
    the a b sequences, whatever a is.

    If the loss or the global gradient norm is not finite, parameters and optimizer state (its
    counters and moments too) keep their exact bits, and only the step counter, the key and the
    skip counters move on.

    Raises:
      MeshError: if a parameter does not divide over the mesh.
    """

    def init(rng: Array) -> TrainState:
        own, following = jax.random.split(jax.random.wrap_key_data(rng, impl="threefry2x32"))
        params = functions.init(own)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), jax.random.key_data(following), zero, zero)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        use, following = jax.random.split(jax.random.wrap_key_data(state.rng, impl="threefry2x32"))
        loss_sum, num_targets, summed = _summed_gradients(functions, state.params, batch, use)
        count = jnp.maximum(num_targets, 1).astype(loss_sum.dtype)
        loss = loss_sum / count
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), summed)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state)
        )
        skipped = 1 - finite.astype(jnp.int32)
        run = (state.nonfinite_run + 1) * skipped
        rate = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
        metrics = StepMetrics(loss, grad_norm, rate, num_targets, skipped, run)
        rng = jax.random.key_data(following)
        after = TrainState(state.step + 1, params, opt_state, rng, state.skipped + skipped, run)
        return after, metrics

    def on_this_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def traced(*arguments: Any) -> Any:
            with on_mesh(mesh, exchange):
                return function(*arguments)

        return traced

    def evaluate(params: Params, batch: Batch) -> tuple[Array, Array]:
        key = jax.random.key(0, impl="threefry2x32")

        def part(total: tuple[Array, Array], rows: Batch) -> tuple[tuple[Array, Array], None]:
            loss_sum, num_targets = functions.loss(params, rows["tokens"], rows["segment_ids"], key)
            return (total[0] + loss_sum, total[1] + num_targets), None

        return jax.lax.scan(part, (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)), batch)[0]

    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32))
    params_at = parameter_shardings(mesh, functions.axes, shapes.params)
    opt_at = optimizer_shardings(mesh, shapes.opt_state, params_at)
    whole, rows_at = replicated(mesh), batch_sharding(mesh)
    shardings = TrainState(whole, params_at, opt_at, whole, whole, whole)
    options = compiler_options(mesh, exchange)
    return StepFunctions(
        init=jax.jit(init, in_shardings=whole, out_shardings=shardings),
        train=jax.jit(
            on_this_mesh(train),
            in_shardings=(shardings, rows_at),
            out_shardings=(shardings, whole),
            donate_argnums=0,
            compiler_options=options,
        ),
        evaluate=jax.jit(
            on_this_mesh(evaluate),
            in_shardings=(params_at, rows_at),
            out_shardings=whole,
            compiler_options=options,
        ),
        shapes=shapes,
        shardings=shardings,
    )


def _summed_gradients(
    functions: ModelFunctions, params: Params, batch: Batch, key: Array
) -> tuple[Array, Array, Params]:
    """(summed loss, targets, gradient of the summed loss) over the leading axis of ``batch``."""

    def value(params: Params, rows: Batch, key: Array) -> tuple[Array, Array]:
        return functions.loss(params, rows["tokens"], rows["segment_ids"], key)

    differentiate = jax.value_and_grad(value, has_aux=True)
    parts = batch["tokens"].shape[0]
    if parts == 1:
        (loss, targets), grads = differentiate(params, jax.tree.map(lambda rows: rows[0], batch), key)
        return loss, targets, grads

    def add(total: Any, xs: tuple[Batch, Array]) -> tuple[Any, None]:
        rows, part_key = xs
        (loss, targets), grads = differentiate(params, rows, part_key)
        return jax.tree.map(jnp.add, total, (loss, targets, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), zeros)
    (loss, targets, grads), _ = jax.lax.scan(add, start, (batch, jax.random.split(key, parts)))
    return loss, targets, grads
