"""From logits to a token: penalty, temperature, top-k, top-p, min-p, seeded noise.

The order is the usual one: repetition penalty, temperature, top-k, top-p, min-p; each filter sees the
distribution that the ones before it left, renormalised.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from holo_jax.array_types import Array, Bool, Float, Int, UInt32
from holo_jax.functional.noise import row_noise

_NOISE = "threefry2x32"
# One over it times any logit of a model is a float32 number.
_LEAST_TEMPERATURE = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; the defaults sample from the model's own distribution.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token, else at least 1e-30.
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the smallest set of likeliest tokens whose probabilities sum to at least p; 1 for all
        (Holtzman et al., "The curious case of neural text degeneration", arXiv:1904.09751).
      min_p: only tokens at least this share as likely as the likeliest one; 0 for all.
      repetition_penalty: positive logits of tokens read or generated before are divided by it, negative
        ones multiplied; 1 for none (Keskar et al., "CTRL", arXiv:1909.05858).

    Raises:
      ValueError: for a value out of range, naming field, value and constraint.
      TypeError: for a value that is not a number, or a top_k that is not an integer.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = int if field.name == "top_k" else int | float
            if not isinstance(value, wanted) or isinstance(value, bool):
                kind = "an integer" if field.name == "top_k" else "a number"
                raise TypeError(f"{field.name} is {value!r}; it must be {kind}")
        if self.temperature and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            least = _LEAST_TEMPERATURE
            raise ValueError(
                f"temperature is {self.temperature}; it must be zero or positive, finite and at least {least}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be positive, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be positive and finite"
            )

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far matter."""
        return self.repetition_penalty != 1.0

    @property
    def plan(self) -> "Plan":
        """What is compiled."""
        filters = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return Plan(greedy=self.temperature == 0, filters=filters and self.temperature > 0)

    @property
    def numbers(self) -> "SamplingNumbers":
        """What compiled code is given; another value needs no new compilation."""
        return SamplingNumbers(
            temperature=jnp.float32(self.temperature),
            top_k=jnp.int32(self.top_k),
            top_p=jnp.float32(self.top_p),
            log_min_p=jnp.float32(math.log(self.min_p) if self.min_p else -math.inf),
            repetition_penalty=jnp.float32(self.repetition_penalty),
        )


class Plan(NamedTuple):
    """The part of ``Sampling`` that decides which code is compiled."""

    greedy: bool
    filters: bool


class SamplingNumbers(NamedTuple):
    """The numbers of ``Sampling`` as float32 and int32 scalars."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    log_min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def sample(
    logits: Float[Array, "b v"],
    numbers: SamplingNumbers,
    seeds: UInt32[Array, "b"],
    positions: UInt32[Array, "b"],
    seen: Bool[Array, "b v"] | None = None,
    *,
    plan: Plan,
) -> Int[Array, "b"]:
    """Draws one token a row.

    A row's noise is a function of its own seed and position: it does not depend on the other rows, nor on
    how many tokens were drawn in one call.

    Args:
      logits: float32; ``-inf`` for tokens that must not be drawn.
      numbers, plan: ``Sampling.numbers`` and ``Sampling.plan``.
      seeds: one a row.
      positions: number of tokens that each row has read.
      seen: tokens to which the repetition penalty applies; none if None.
    """
    return draw(logits, numbers, row_keys(seeds, positions), seen, plan=plan)[0]


def row_keys(seeds: UInt32[Array, "b"], positions: UInt32[Array, "*n b"]) -> UInt32[Array, "*n b k"]:
    """Keys of the noise of rows that have read so many tokens."""

    def key(seed: Array, position: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl=_NOISE), position))

    return jnp.vectorize(key, signature="(),()->(k)")(jnp.broadcast_to(seeds, positions.shape), positions)


def draw(
    logits: Float[Array, "b v"],
    numbers: SamplingNumbers,
    keys: UInt32[Array, "b k"],
    seen: Bool[Array, "b v"] | None = None,
    checked: Bool[Array, "b v"] | None = None,
    *,
    plan: Plan,
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """``sample`` with the keys of ``row_keys``.

    Args:
      checked: flags to look at on the way.

    Returns:
      The tokens, and whether all flags of a row are true.
    """
    checked = jnp.ones(logits.shape, bool) if checked is None else checked
    if seen is not None:
        penalised = jnp.where(
            logits > 0, logits / numbers.repetition_penalty, logits * numbers.repetition_penalty
        )
        logits = jnp.where(seen, penalised, logits)
    if plan.greedy:
        return _highest(logits, checked)
    logits = logits * (1 / numbers.temperature)
    order = None
    if plan.filters:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        logits = filter_sorted(jnp.take_along_axis(logits, order, axis=-1), numbers)
    drawn, checks = _highest(logits + noise(keys, logits.shape[-1]), checked)
    if order is not None:
        drawn = jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return drawn, checks


def noise(keys: UInt32[Array, "*n k"], size: int) -> Float[Array, "*n v"]:
    """What is added to the logits of rows with these keys."""
    return jnp.vectorize(lambda key: row_noise(key, size), signature="(k)->(v)")(keys)


def _highest(
    scores: Float[Array, "b v"], flags: Bool[Array, "b v"]
) -> tuple[Int[Array, "b"], Bool[Array, "b"]]:
    """``argmax`` of each row, and ``all`` of its flags, in one reduction: their kernels would be two."""

    def better(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        (x, at, of_a), (y, other, of_b) = a, b
        first = (x > y) | (x != x)
        lower = first | ((x == y) & (at < other))
        return jnp.where(first, x, y), jnp.where(lower, at, other), of_a & of_b

    places = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=jnp.int32), scores.shape)
    none = (jnp.float32(-jnp.inf), jnp.int32(0), jnp.bool_(True))
    _, drawn, checks = jax.lax.reduce((scores, places, flags), none, better, (1,))
    return drawn, checks


def filter_sorted(logits: Float[Array, "b v"], numbers: SamplingNumbers) -> Float[Array, "b v"]:
    """``-inf`` for what top-k, top-p and min-p leave out of logits sorted from high to low."""
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    kept = jnp.where((numbers.top_k == 0) | (rank < numbers.top_k), logits, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # A rounded cumulative sum may reach 1 before the last token: top_p = 1 must still keep all.
    inside = (before < numbers.top_p) | (rank == 0) | (numbers.top_p >= 1)
    likely = logits >= logits[:, :1] + numbers.log_min_p
    return jnp.where(inside & likely, kept, -jnp.inf)
