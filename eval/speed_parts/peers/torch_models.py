"""The peers in PyTorch: a Llama-style decoder, the published positional mechanism, models of ``fla``.

All have one interface: ``model(tokens [b, t]) -> final hidden states [b, t, e]`` and ``model.head``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLA_MODELS = ("gla", "gated_deltanet")


class RmsNorm(nn.Module):
    """x / rms(x) * w, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


class CausalAttention(nn.Module):
    """Softmax attention with rotary positions, queries, keys and values from one product."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.heads, self.head = width // head, head
        self.maps = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Mixes tokens; ``rotary`` holds cosines and sines, [2, t, head / 2]."""
        b, t, e = x.shape
        queries, keys, values = self.maps(x).view(b, t, 3, self.heads, self.head).unbind(2)
        cos, sin = rotary[:, None, :, None]

        def rotated(z: Tensor) -> Tensor:
            first, second = z.float().chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(z.dtype)

        mixed = F.scaled_dot_product_attention(
            rotated(queries).transpose(1, 2),
            rotated(keys).transpose(1, 2),
            values.transpose(1, 2),
            is_causal=True,
        )
        return self.out(mixed.transpose(1, 2).reshape(b, t, e))


class SwiGlu(nn.Module):
    """W3 (silu(W1 x) * W2 x), as many parameters as two maps of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        multiple = 64 if width >= 512 else 8
        hidden = math.ceil(8 * width / 3 / multiple) * multiple
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP."""
        gate, hidden = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * hidden)


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.mixer_norm, self.mlp_norm = RmsNorm(width), RmsNorm(width)
        self.mixer, self.mlp = CausalAttention(width, head), SwiGlu(width)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """One block."""
        x = x + self.mixer(self.mixer_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class PhasorSum(nn.Module):
    """y_t = Re(e^{-i w t} sum_{s <= t} e^{i w s} v_s) / sqrt(t): fixed phasors, no gates, no content."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.values = nn.Linear(width, channels, bias=False)
        self.out = nn.Linear(channels, width, bias=False)
        self.register_buffer("frequencies", 10 * torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Mixes tokens."""
        t = x.shape[1]
        time = torch.arange(t, device=x.device, dtype=torch.float32)
        phases = time[:, None] * self.frequencies
        phasors = torch.polar(torch.ones_like(phases), phases)
        memory = torch.cumsum(self.values(x).float() * phasors, dim=1)
        read = (memory * phasors.conj()).real / torch.sqrt(time + 1)[:, None]
        return self.out(read.to(x.dtype))


class SeedBlock(nn.Module):
    """x + memory(norm(x)), then x + mlp(norm(x)), with LayerNorm and a GELU MLP of four times the width."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.mixer_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = PhasorSum(width, channels)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """One block; rotary positions are not used."""
        del rotary
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm, and the output projection, which the loss applies."""

    def __init__(
        self, blocks: list[nn.Module], norm: nn.Module, vocab: int, width: int, head: int, length: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks, self.norm = nn.ModuleList(blocks), norm
        self.head = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        # Once, not in every layer of every step.
        angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, head, 2) / head)
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Final hidden states of tokens [b, length]."""
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.norm(x)


class FlaDecoder(nn.Module):
    """A causal language model of flash-linear-attention behind the same interface."""

    def __init__(self, name: str, layers: int, width: int, vocab: int) -> None:
        super().__init__()
        from fla import models

        # The MLP's width brings each within 5% of the others' parameters in products.
        shared = dict(
            hidden_size=width,
            num_hidden_layers=layers,
            vocab_size=vocab,
            tie_word_embeddings=False,
            fuse_cross_entropy=False,
        )
        if name == "gla":
            config = models.GLAConfig(num_heads=width // 256, intermediate_size=43 * width // 16, **shared)
            model = models.GLAForCausalLM(config)
        else:
            config = models.GatedDeltaNetConfig(
                num_heads=3 * width // 1024, head_dim=256, intermediate_size=2 * width, **shared
            )
            model = models.GatedDeltaNetForCausalLM(config)
        self.inner, self.head = model.model, model.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        """Final hidden states of tokens [b, t]."""
        return self.inner(input_ids=tokens, use_cache=False).last_hidden_state


def build(name: str, *, layers: int, width: int, vocab: int, length: int, head: int = 64) -> nn.Module:
    """A peer by name (llama, llama_cudnn, seed, seed_eager, gla or gated_deltanet) for rows of ``length``."""
    if name.startswith("seed"):
        blocks: list[nn.Module] = [SeedBlock(width, 2 * width) for _ in range(layers)]
        return Decoder(blocks, nn.LayerNorm(width), vocab, width, head, length)
    if name.startswith("llama"):
        blocks = [LlamaBlock(width, head) for _ in range(layers)]
        return Decoder(blocks, RmsNorm(width), vocab, width, head, length)
    return FlaDecoder(name, layers, width, vocab)


def product_parameters(model: nn.Module) -> int:
    """Parameters in a matrix product for every token: all matrices but the embedding table."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(
        p.numel() for p in model.parameters() if p.ndim == 2 and min(p.shape) >= 16 and id(p) not in tables
    )
