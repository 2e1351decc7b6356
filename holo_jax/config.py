"""The model configuration: frozen, validated, one preset per word, derived sizes as properties."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from holo_jax.precision import MIXED, Precision

Mixer = Literal["holo", "attention", "ssm"]
Binding = Literal["outer", "hadamard"]
Addressing = Literal["content", "position", "both"]
Scale = Literal["auto", "none", "sqrt_time", "sqrt_writes"]
Norm = Literal["rmsnorm", "layernorm"]
Mlp = Literal["swiglu", "gelu", "linear", "none"]
Remat = Literal["none", "dots", "full"]
Frequencies = Literal["uniform", "normal", "multiscale"]
Backend = Literal["auto", "portable", "products", "norms", "mixer"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "mixer": get_args(Mixer),
    "binding": get_args(Binding),
    "addressing": get_args(Addressing),
    "retrieval_scale": get_args(Scale),
    "norm": get_args(Norm),
    "mlp": get_args(Mlp),
    "remat": get_args(Remat),
    "frequencies": get_args(Frequencies),
    "block_backend": get_args(Backend),
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "hd_dim",
    "num_hidden_layers",
    "head_dim",
    "phasors",
    "mlp_ratio",
    "phase_scale",
    "frequency_std",
    "rope_base",
    "initializer_range",
    "norm_eps",
    "loss_chunk",
)


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoloConfig:
    """Configuration of a Holo-Transformer; the defaults are the ``holo`` preset.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: residual width.
      hd_dim: value channels over all heads (heads x ``head_dim``).
      num_hidden_layers: number of blocks.
      head_dim: value channels d of one head; must divide ``hd_dim``.
      phasors: phasor components m of one head's key (``outer``). ``hadamard`` has m = d.
      mixer: what mixes tokens: the phasor memory, or a baseline in the same block.
      binding: ``outer`` (state m x d a head) or ``hadamard`` (state d a head).
      addressing: phases from ``content``, from ``position``, or ``both`` memories mixed by learned weights.
      write_gate: learn how strongly each token is written, g_t = sigmoid(w.x + b).
      erase: remove what a key reads before writing to it (``outer`` only; needs ``write_gate``).
      erase_bias: bias b of the erase gate e_t = g_t sigmoid(w.x + b) at initialisation.
      output_gate: multiply the retrieval by silu(W x).
      head_norm: RMSNorm of each head's retrieval.
      retrieval_scale: what a retrieval is divided by; ``auto`` is ``none`` with erase, else ``sqrt_writes``.
      short_conv: taps of the causal depthwise convolutions over phases (and over the inputs of ``ssm``);
        0 writes with the previous token's phase and reads with the current one, fixed.
      value_conv: taps of a causal depthwise convolution over the values, which starts as the identity and
        lets a value hold a few neighbouring tokens; 0 for none.
      phase_scale: radians per unit of the phase projection.
      frequencies: distribution of the positional phasors: ``uniform`` on the circle, ``normal`` with
        ``frequency_std`` radians a step, ``multiscale`` with one deviation a head.
      frequency_std: see ``frequencies`` (the largest one for ``multiscale``).
      phasor_seed: seed of the positional phasors (they are fixed, not trained).
      norm: normalisation before each sub-layer and at the end.
      norm_eps: its epsilon.
      mlp: the denoiser: ``swiglu``, ``gelu`` (with biases), ``linear`` (no non-linearity), or ``none``.
      mlp_ratio: hidden width of the ``gelu`` form over ``hidden_size``; ``swiglu`` has equal parameters.
      anchor_every: make every k-th layer softmax attention with RoPE; 0 for none.
      attention_window: sliding window of attention layers in tokens; 0 for full causal attention.
      rope_base: base of the rotary frequencies.
      key_conv: taps of a causal depthwise convolution over the keys of attention layers, which starts as the
        mean of the previous and the current key ("smeared" keys: Olsson et al. 2022); 0 for none.
      tie_embeddings: use the embedding as the output projection.
      initializer_range: standard deviation of the output projection at initialisation.
      remat: what the backward pass recomputes: nothing, all but matrix products, or whole blocks.
      scan_unroll: blocks unrolled in each iteration of the scan over depth.
      memory_method: form of the accumulation: ``chunked``, ``associative_scan`` or ``recurrent``.
      memory_backend: ``auto`` picks a kernel by capability, ``portable`` is plain JAX, ``ensemble`` is
        ``auto`` for models under ``jax.vmap``.
      block_backend: kernels beside the memory's: ``products``, of denoiser and loss; ``norms`` or ``mixer``,
        also those around norms, or around the memory; ``auto``, all; ``portable``, none, as where
        ``memory_backend`` is ``portable`` or ``ensemble``. What a kernel cannot run here runs without it.
      chunk_size: tokens a chunk of the memory; 0 lets the form choose.
      loss_chunk: tokens whose logits exist at one time in the loss.
      precision: dtypes by role.

    Raises:
      ValueError: for a field out of range, naming field, value and constraint.
      TypeError: for a field of the wrong type.
    """

    vocab_size: int = 32000
    hidden_size: int = 1024
    hd_dim: int = 2048
    num_hidden_layers: int = 12
    head_dim: int = 64
    phasors: int = 32
    mixer: Mixer = "holo"
    binding: Binding = "outer"
    addressing: Addressing = "content"
    write_gate: bool = True
    erase: bool = True
    erase_bias: float = -2.0
    output_gate: bool = True
    head_norm: bool = True
    retrieval_scale: Scale = "auto"
    short_conv: int = 4
    value_conv: int = 0
    phase_scale: float = 1.0
    frequencies: Frequencies = "uniform"
    frequency_std: float = 10.0
    phasor_seed: int = 0
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: Mlp = "swiglu"
    mlp_ratio: float = 4.0
    anchor_every: int = 0
    attention_window: int = 0
    rope_base: float = 10000.0
    key_conv: int = 0
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    remat: Remat = "none"
    scan_unroll: int = 1
    memory_method: str = "chunked"
    memory_backend: str = "auto"
    block_backend: Backend = "auto"
    chunk_size: int = 0
    loss_chunk: int = 8192
    precision: Precision = MIXED

    def __post_init__(self) -> None:
        _check_types(self)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in (
            "anchor_every",
            "attention_window",
            "short_conv",
            "value_conv",
            "key_conv",
            "chunk_size",
            "phasor_seed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be zero or positive")
        if self.hd_dim % self.head_dim:
            raise ValueError(f"hd_dim is {self.hd_dim}; it must be a multiple of head_dim ({self.head_dim})")
        if self.short_conv == 1:
            raise ValueError(
                "short_conv is 1; it must be 0 (fixed shift) or at least 2 taps (current and previous)"
            )
        for name in ("value_conv", "key_conv"):
            if getattr(self, name) == 1:
                raise ValueError(
                    f"{name} is 1; it must be 0 (none) or at least 2 taps (current and previous)"
                )
        if self.scan_unroll < 1:
            raise ValueError(f"scan_unroll is {self.scan_unroll}; it must be at least 1")
        if self.erase and self.mixer == "holo":
            if self.binding != "outer":
                raise ValueError(
                    f"erase is True with binding {self.binding!r}; erasing needs binding 'outer'"
                )
            if not self.write_gate:
                raise ValueError(
                    "erase is True with write_gate False; the erase gate is a share of the write gate"
                )
        if self.addressing != "content" and self.mixer == "holo" and self.binding != "hadamard":
            raise ValueError(
                f"addressing is {self.addressing!r}; positional memories need binding 'hadamard'"
            )
        if self.anchor_every and self.num_hidden_layers % self.anchor_every:
            raise ValueError(
                f"anchor_every is {self.anchor_every}; it must divide"
                f" num_hidden_layers ({self.num_hidden_layers})"
            )
        if (self.mixer == "attention" or self.anchor_every) and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary attention needs an even one")

    @classmethod
    def seed(cls, **overrides: Any) -> Self:
        """The published mechanism: positional hadamard memory, no gates, LayerNorm, GELU denoiser."""
        return cls(**_SEED | overrides)

    @classmethod
    def dual(cls, **overrides: Any) -> Self:
        """The published dual path: positional and associative hadamard memories, multiscale heads."""
        return cls(**_DUAL | overrides)

    @classmethod
    def attention(cls, **overrides: Any) -> Self:
        """Softmax attention with rotary positions in the same block; hd_dim defaults to hidden_size."""
        hidden = overrides.get("hidden_size", cls.hidden_size)
        own: dict[str, Any] = dict(mixer="attention", erase=False, hd_dim=hidden)
        return cls(**own | overrides)

    @classmethod
    def ssm(cls, **overrides: Any) -> Self:
        """A Mamba-2-style state-space layer (scalar decay a head) with the same state size as ``holo``."""
        own: dict[str, Any] = dict(mixer="ssm", erase=False)
        return cls(**own | overrides)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The preset called ``name``: holo, seed, dual, attention or ssm.

        Raises:
          ValueError: for another name.
        """
        presets: dict[str, Any] = {
            "holo": cls,
            "seed": cls.seed,
            "dual": cls.dual,
            "attention": cls.attention,
            "ssm": cls.ssm,
        }
        if name not in presets:
            raise ValueError(f"preset is {name!r}; it must be one of {', '.join(presets)}")
        return presets[name](**overrides)

    @property
    def num_heads(self) -> int:
        """Heads of the mixer."""
        return self.hd_dim // self.head_dim

    @property
    def key_dim(self) -> int:
        """Phasor components m of one head."""
        return self.phasors if self.binding == "outer" else self.head_dim

    @property
    def ssm_state(self) -> int:
        """State dimension of the ssm baseline: as many floats a head as ``outer`` with these phasors."""
        return 2 * self.phasors

    @property
    def read_scale(self) -> str:
        """The retrieval scale with ``auto`` resolved."""
        if self.retrieval_scale != "auto":
            return self.retrieval_scale
        return "none" if self.erase else "sqrt_writes"

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the denoiser."""
        if self.mlp == "swiglu":
            # Whole tiles of matrix units; a quarter of that at widths where it would distort the size.
            multiple = 256 if self.hidden_size >= 1024 else 64 if self.hidden_size >= 512 else 8
            return _round_up(self.mlp_ratio * self.hidden_size * 2 / 3, multiple)
        return int(self.mlp_ratio * self.hidden_size)

    @property
    def products_backend(self) -> str:
        """``block_backend``; portable where the memory's is, or an ensemble's."""
        return "portable" if self.memory_backend in ("portable", "ensemble") else self.block_backend

    @property
    def layer_kinds(self) -> tuple[Mixer, ...]:
        """Mixers of one period of depth; the model repeats it."""
        if not self.anchor_every:
            return (self.mixer,)
        return (self.mixer,) * (self.anchor_every - 1) + ("attention",)

    @property
    def num_periods(self) -> int:
        """How often ``layer_kinds`` repeats."""
        return self.num_hidden_layers // len(self.layer_kinds)

    @property
    def state_floats_per_layer(self) -> int:
        """float32 numbers in one layer's memory (the capacity figure; 0 for attention, whose cache grows).

        The convolution tail and the compensation of the running sum are not capacity and not counted.
        """
        if self.mixer == "attention":
            return 0
        if self.mixer == "ssm":
            return self.hd_dim * self.ssm_state
        if self.binding == "outer":
            return 2 * self.phasors * self.hd_dim
        return 2 * self.hd_dim * (2 if self.addressing == "both" else 1)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with these fields; the inverse of ``to_dict``.

        Raises:
          ValueError: for an unknown field, with the nearest known name.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        values = dict(values)
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"{name} is no field of HoloConfig" + (f"; did you mean {near[0]}?" if near else "")
                )
        if isinstance(values.get("precision"), Mapping):
            values["precision"] = Precision(**values["precision"])
        return cls(**values)


def _check_types(config: HoloConfig) -> None:
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        expected: Any = type(default)
        if expected is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif expected is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, expected)
        if not fits:
            raise TypeError(
                f"{field.name} is {value!r} ({type(value).__name__}); it must be {expected.__name__}"
            )


_SEED: dict[str, Any] = dict(
    phase_scale=3.141592653589793,
    binding="hadamard",
    addressing="position",
    write_gate=False,
    erase=False,
    output_gate=False,
    head_norm=False,
    retrieval_scale="sqrt_time",
    norm="layernorm",
    mlp="gelu",
)
_DUAL: dict[str, Any] = _SEED | dict(addressing="both", frequencies="multiscale", short_conv=0)
