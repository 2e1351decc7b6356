"""Small layers: linear maps, norms, the denoiser. Parameters carry their logical axes as metadata."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from holo_jax import kernels
from holo_jax.array_types import Array, Float, Int
from holo_jax.config import HoloConfig
from holo_jax.functional.gradient_once import gradient_once
from holo_jax.parallel import (
    DATA,
    PARAMETER_AXES,
    TENSOR,
    ambient_mesh,
    divides_tokens,
    gathering_again,
    layout,
    parameter_layout,
    rounded_once,
    sharded,
    summed_over_tensor,
    tensor_axis,
    whole,
)
from holo_jax.residual import Pending, summands

Axes = tuple[str | None, ...]


def parameter(value: Array, axes: Axes) -> nnx.Param:
    """A parameter with one logical axis name (or None) a dimension."""
    if value.ndim != len(axes):
        raise ValueError(f"axes {axes} name {len(axes)} dimensions; the parameter has {value.ndim}")
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """y = x W (+ b), W ~ N(0, std^2) with std = 1/sqrt(fan_in) by default; accumulates in float32."""

    def __init__(
        self,
        config: HoloConfig,
        features: tuple[int, int],
        axes: Axes,
        *,
        std: float | None = None,
        bias: bool = False,
        bias_init: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        fan_in, fan_out = features
        std = 1 / math.sqrt(fan_in) if std is None else std
        self.storage, self.axes, self.recomputed = config.precision.storage, axes, config.remat != "none"
        dtype = jnp.dtype(config.precision.params)
        self.weight = parameter(std * jax.random.normal(rngs.params(), features, dtype), axes)
        self.bias = parameter(jnp.full((fan_out,), bias_init, dtype), axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "b t i"], *, out_dtype: str | None = None) -> Float[Array, "b t o"]:
        """Applies the map; the product's operands have the storage dtype, its result ``out_dtype``."""
        return _apply((self,), x, (out_dtype,))[0]

    @property
    def parameters(self) -> tuple[Array, Array | None]:
        """Weight and bias."""
        return self.weight[...], None if self.bias is None else self.bias[...]

    @property
    def whole_weight(self) -> Array:
        """The weight in one piece along ``fsdp``, where a device runs the map by itself; rounded for it."""
        return rounded_once(self.weight[...], self.axes, self.storage)

    def product(self, x: Array, parameters: tuple[Array, Array | None], out_dtype: str | None) -> Array:
        """The map with these parameters, which on a mesh are one device's parts."""
        weight, bias = parameters
        y = jnp.einsum(
            "bti,io->bto",
            x.astype(self.storage),
            whole(weight, self.axes, self.storage).astype(self.storage),
            preferred_element_type=jnp.dtype(out_dtype or self.storage),
        )
        if _on_tensor(self.axes[0]):
            y = summed_over_tensor(y)
        return gradient_once(y if bias is None else y + bias.astype(y.dtype)[None, None])


def _apply(maps: tuple[Linear, ...], x: Array, out_dtypes: tuple[str | None, ...]) -> tuple[Array, ...]:
    """Linear maps of one input; on a mesh by parts, whose gradients of the input are summed once for all."""

    def own(x: Array, parameters: tuple[Any, ...]) -> tuple[Array, ...]:
        every = zip(maps, parameters, out_dtypes, strict=True)
        return tuple(one.product(x, given, dtype) for one, given, dtype in every)

    if ambient_mesh() is None:
        return own(x, tuple(one.parameters for one in maps))
    parameters_at = tuple(
        (parameter_layout(one.axes), None if one.bias is None else parameter_layout(one.axes[1:]))
        for one in maps
    )
    results = tuple(layout("b t h" if _on_tensor(one.axes[1]) else "b t _") for one in maps)
    rows = layout("b t h" if _on_tensor(maps[0].axes[0]) else "b t _")
    own = own if maps[0].recomputed else gathering_again(own)
    return sharded(own, (rows, parameters_at), results)(x, tuple(one.parameters for one in maps))


def _on_tensor(name: str | None) -> bool:
    return name is not None and PARAMETER_AXES[name] == TENSOR


class JoinedLinear(nnx.Module):
    """Several linear maps of one input as one product, for decoding; see ``project``.

    Biases stay with the maps. The product is accumulated in float32.
    """

    def __init__(self, storage: str, names: tuple[str, ...], sizes: tuple[int, ...], weight: Array) -> None:
        self.storage, self.names, self.sizes = storage, names, sizes
        self.weight = parameter(weight, ("embed", "heads"))

    def __call__(
        self, x: Float[Array, "b t i"], out_dtype: str = "float32"
    ) -> dict[str, Float[Array, "b t o"]]:
        """Results by name."""
        weight, dtype = self.weight[...].astype(self.storage), jnp.dtype(out_dtype)
        y = jnp.einsum("bti,io->bto", x.astype(self.storage), weight, preferred_element_type=dtype)
        borders = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return dict(zip(self.names, jnp.split(y, borders, axis=-1), strict=True))


def project(
    module: nnx.Module, x: Float[Array, "b t i"], out_dtypes: dict[str, str | None]
) -> dict[str, Array]:
    """Applies the linear maps of a module, given by name, to the same input.

    One product each; or one for all where ``join`` has put them together, with the same numbers up to the
    order of sums.

    Args:
      module: has the maps as attributes.
      x: input.
      out_dtypes: names and result dtypes; None is the storage dtype.
    """
    joined: JoinedLinear | None = getattr(module, "joined", None)
    if joined is None:
        maps = tuple(getattr(module, name) for name in out_dtypes)
        return dict(zip(out_dtypes, _apply(maps, x, tuple(out_dtypes.values())), strict=True))
    results = {}
    # Float32 only if a map asks for it: with many rows the result is as many bytes as the weights.
    narrow = all(dtype in (None, joined.storage) for dtype in out_dtypes.values())
    for name, y in joined(x, joined.storage if narrow else "float32").items():
        bias = getattr(module, name).bias
        y = y.astype(out_dtypes[name] or joined.storage)
        results[name] = y if bias is None else y + bias[...].astype(y.dtype)[None, None]
    return results


def normed_project(
    norm: "Normalization",
    module: nnx.Module,
    x: Float[Array, "b t e"],
    pending: Pending | None,
    out_dtypes: dict[str, str | None],
) -> tuple[Float[Array, "b t e"], dict[str, Array]]:
    """x with what is pending, and ``project`` of its norm, by kernels (``kernels.block``)."""
    maps = {name: getattr(module, name) for name in out_dtypes}
    dtypes = tuple(jnp.dtype(dtype or maps[name].storage) for name, dtype in out_dtypes.items())
    weights = tuple(one.whole_weight for one in maps.values())
    total, products = kernels.block.normed_products(
        x, *summands(pending), *norm.parameters, weights, dtypes=dtypes, eps=norm.eps
    )
    results = {}
    for y, (name, one) in zip(products, maps.items(), strict=True):
        results[name] = y if one.bias is None else y + one.bias[...].astype(y.dtype)[None, None]
    return total, results


def join(module: Any, names: tuple[str, ...]) -> None:
    """Puts the weights of linear maps of one input into one array, in the storage dtype; in place."""
    maps = [getattr(module, name) for name in names]
    storage = maps[0].storage
    weight = jnp.concatenate([one.weight[...].astype(storage) for one in maps], axis=-1)
    module.joined = JoinedLinear(storage, names, tuple(one.weight.shape[-1] for one in maps), weight)
    for one in maps:
        del one.weight


class Normalization(nnx.Module):
    """RMSNorm, x / rms(x) * w, or LayerNorm, (x - mean) / std * w + b, in float32 over the last axis."""

    def __init__(
        self, config: HoloConfig, shape: tuple[int, ...], axes: Axes, *, kind: str | None = None
    ) -> None:
        kind = kind or config.norm
        dtype = jnp.dtype(config.precision.params)
        self.storage, self.eps = config.precision.storage, config.norm_eps
        self.weight = parameter(jnp.ones(shape, dtype), axes)
        self.bias = parameter(jnp.zeros(shape, dtype), axes) if kind == "layernorm" else None
        self.backend = config.products_backend

    @property
    def parameters(self) -> tuple[Array, Array | None]:
        """Weight and bias."""
        return self.weight[...], None if self.bias is None else self.bias[...]

    def fuses(self, x: Array) -> bool:
        """Whether kernels may norm rows ``[b, t, e]``, and can."""
        return (
            kernels.block.uses(self.backend, "norms")
            and x.dtype == jnp.dtype(self.storage)
            and kernels.block.unsupported(x) is None
        )

    def rows(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        """The same as calling it on ``[b, t, e]``, by a kernel where one may run."""

        def own(x: Array, weight: Array, bias: Array | None) -> Array:
            if self.fuses(x):
                return kernels.block.normed(x, weight, bias, eps=self.eps)
            return self._plain(x, weight, bias)

        rows, vector = layout("b t"), layout("_")
        run = sharded(own, (rows, vector, vector), rows) if divides_tokens() else own
        return run(x, *self.parameters)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalises the last axis; the result has the storage dtype."""
        return self._plain(x, *self.parameters)

    def _plain(self, x: Array, weight: Array, bias: Array | None) -> Array:
        x = x.astype(jnp.float32)
        lead = (None,) * (x.ndim - weight.ndim)
        if bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = x * weight.astype(jnp.float32)[lead]
        if bias is not None:
            x = x + bias.astype(jnp.float32)[lead]
        return x.astype(self.storage)


class Denoiser(nnx.Module):
    """The block's MLP, which cleans what a superposition returned.

    ``swiglu``: W3 (silu(W1 x) * W2 x). ``gelu``: W2 gelu(W1 x + b1) + b2, exact erf. ``linear``: the
    same two maps without the non-linearity, for the ablation of the claim that it is needed.
    """

    def __init__(self, config: HoloConfig, *, rngs: nnx.Rngs) -> None:
        e, f = config.hidden_size, config.mlp_dim
        self.kind, self.backend = config.mlp, config.products_backend
        bias = config.mlp == "gelu"
        self.up = Linear(config, (e, f), ("embed", "mlp"), bias=bias, rngs=rngs)
        self.gate = Linear(config, (e, f), ("embed", "mlp"), rngs=rngs) if config.mlp == "swiglu" else None
        std = residual_std(config, f)
        self.down = Linear(config, (f, e), ("mlp", "embed"), std=std, bias=bias, rngs=rngs)

    @property
    def maps(self) -> dict[str, str | None]:
        """Linear maps of the input, and their result dtypes."""
        return {"up": None} if self.gate is None else {"up": None, "gate": None}

    def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        """Applies the denoiser."""
        if self.gate is not None and getattr(self, "joined", None) is None:
            maps = (self.gate, self.up, self.down)
            weights_at = tuple(parameter_layout(one.axes) for one in maps)
            gated = self._gated if self.down.recomputed else gathering_again(self._gated)
            own = sharded(gated, (layout("b t"), *weights_at), layout("b t"))
            return own(x.astype(self.down.storage), *(one.weight[...] for one in maps))
        return self._finish(project(self, x, self.maps))

    def after(
        self, norm: Normalization, x: Float[Array, "b t e"], delta: Float[Array, "b t e"]
    ) -> tuple[Float[Array, "b t e"], Pending]:
        """``x + delta``, and the denoiser of its norm, by kernels (``kernels.block``)."""
        if self.gate is not None and kernels.swiglu_runs(x, self.up.whole_weight, self.backend):
            weights = (layer.whole_weight for layer in (self.gate, self.up, self.down))
            total, y = kernels.block.normed_swiglu(x, delta, *norm.parameters, *weights, eps=norm.eps)
            return total, Pending(y)
        if self.kind == "gelu":
            assert self.up.bias is not None and self.down.bias is not None
            maps = (self.up.whole_weight, self.up.bias[...], self.down.whole_weight)
            keep = not self.down.recomputed
            total, y = kernels.block.normed_gelu(x, delta, *norm.parameters, *maps, eps=norm.eps, keep=keep)
            return total, Pending(y, self.down.bias[...][None, None])
        total, results = normed_project(norm, self, x, Pending(delta), self.maps)
        return total, Pending(self._finish(results))

    def _finish(self, results: dict[str, Array]) -> Array:
        hidden = results["up"]
        if self.gate is not None:
            hidden = jax.nn.silu(results["gate"]) * hidden
        elif self.kind == "gelu":
            hidden = jax.nn.gelu(hidden, approximate=False)
        return self.down(hidden)

    def _gated(self, x: Array, gate: Array, up: Array, down: Array) -> Array:
        inner, outer = ("embed", "mlp"), ("mlp", "embed")
        weights = (whole(w, axes, x.dtype) for w, axes in ((gate, inner), (up, inner), (down, outer)))
        return summed_over_tensor(kernels.swiglu(x, *weights, backend=self.backend))


def lookup(
    table: Float[Array, "v e"] | Float[Array, "n v e"], ids: Int[Array, "b t"], dtype: str
) -> Float[Array, "b t e"]:
    """Rows of an embedding table in ``dtype``; on a mesh each device looks in its part of the vocabulary.

    The table may be given once a device (``holo_jax.ordered_sums.summed_meanwhile``).
    """

    axes, each = ("vocab", "embed"), table.ndim == 3

    def own(table: Array, ids: Array) -> Array:
        axis = tensor_axis()
        table = whole(table[0] if each else table, axes, dtype)
        if axis is None:
            return table[ids].astype(dtype)
        ids = ids - lax.axis_index(axis) * table.shape[0]
        here = (ids >= 0) & (ids < table.shape[0])
        found = table[jnp.where(here, ids, 0)].astype(dtype)
        return summed_over_tensor(jnp.where(here[..., None], found, jnp.zeros((), dtype)))

    at = P(DATA) if each else parameter_layout(axes)
    return sharded(own, (at, layout("b t")), layout("b t"))(table, ids)


def residual_std(config: HoloConfig, fan_in: int) -> float:
    """Standard deviation of a map that writes into the residual stream.

    Two such maps a block: each is scaled by 1/sqrt(2 L), so the stream's variance does not grow with
    depth. This is the only place where depth enters the initialisation.
    """
    return 1 / math.sqrt(fan_in * 2 * config.num_hidden_layers)


def embedding_std(config: HoloConfig) -> float:
    """Standard deviation of the embedding table at initialisation.

    The residual stream starts at unit variance: a smaller start is divided out by the first norms, which
    multiplies gradients on their way down (by thousands over 24 layers at 0.02). A tied table has the
    output projection's deviation and is divided by it on the way in.
    """
    return config.initializer_range if config.tie_embeddings else 1.0
