"""What the planner knows of hardware: every measured or assumed constant, with where it comes from."""

import dataclasses

from holo_jax.config import HoloConfig
from holo_jax.target import Card

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Link:
    """A network between devices.

    Attributes:
      name: what is printed.
      bytes_per_second: what one device sends and receives in a ring (the "bus bandwidth" of a collective).
      seconds_per_hop: of one message between neighbours, however small.
      seconds_per_exchange: of starting a collective among all devices, however few they are.
    """

    name: str
    bytes_per_second: float
    seconds_per_hop: float
    seconds_per_exchange: float

    def seconds(self, sent: float, hops: int, exchanges: int) -> float:
        """Duration of collectives one after the other that send so many bytes from a device in all."""
        started = hops * self.seconds_per_hop + exchanges * self.seconds_per_exchange
        return sent / self.bytes_per_second + started


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device and its networks.

    Attributes:
      name: of the device.
      card: what programs are traced for.
      hbm_gb: its memory in 10^9 bytes, as it is sold.
      product_flops: rate of a large bfloat16 product.
      copy_bytes: bytes read plus written a second by a large copy.
      node_devices: devices joined by ``inside``; further ones are reached by ``between``.
    """

    name: str
    card: Card
    hbm_gb: float
    product_flops: float
    copy_bytes: float
    node_devices: int
    inside: Link
    between: Link

    def link(self, devices: int, in_node: int) -> Link:
        """The network of a ring of ``devices``, ``in_node`` of them in each node.

        A ring enters and leaves a node once, and as many rings as it has members there run side by side, each
        through the port of another member: together at most at the rate inside the node.
        """
        if in_node >= devices:
            return self.inside
        rate = min(self.inside.bytes_per_second, in_node * self.between.bytes_per_second)
        hop = (self.between.seconds_per_hop + (in_node - 1) * self.inside.seconds_per_hop) / in_node
        return Link(self.between.name, rate, hop, self.between.seconds_per_exchange)


# Measured with jax 0.11.2: on 2026-11-24 the 8192^3 product and the copy on one H100; on 2026-11-28 the all-
# reduce on four of one host, NVLS off: 44 us for 1 KiB, 48 for 1 MiB, 413 for 64 MiB, 2,755 for 512 MiB;
# rate and fixed part are the fit of ``eval.scaling.fit_link`` (43.8 us and 279 GB/s), six hops taken off.
# Assumed: hops, the size of a node, one 400 Gbit/s InfiniBand port a device, and that between nodes a
# collective starts as slowly.
H100 = Hardware(
    name="NVIDIA H100",
    card=Card(compute_capability=(9, 0), multiprocessors=132),
    hbm_gb=80.0,
    product_flops=702e12,
    copy_bytes=2.96e12,
    node_devices=8,
    inside=Link("NVLink", 279e9, 3e-6, 25.8e-6),
    between=Link("InfiniBand", 50e9, 10e-6, 25.8e-6),
)

# Share of ``product_flops`` that a whole train step reaches, by mixer, with all kernels and without those
# between products, which a model divided over ``tensor`` does not run: 12 layers, width 1024, vocabulary
# 32,000, rows of 2,048 tokens, 32,768 tokens a step, blocks unrolled, remat "dots" (without erase "none");
# eval.speed on one H100, jax 0.11.2. In thousands of tokens a second: with all kernels ``holo`` 362, without
# erase 395, ``seed`` 409 (2026-11-28, docs/log.md), attention 342 (2026-11-25); without those
# 307, 312, 189 (all portable) and 287 (2026-11-24 and 25).
MEASURED_SHARES = {
    "holo": (0.560, 0.470),
    "holo without erase": (0.611, 0.476),
    "attention": (0.615, 0.516),
    "seed": (0.642, 0.297),
}


def measured_form(config: HoloConfig, kind: str) -> tuple[str, bool]:
    """The key of ``MEASURED_SHARES`` for a mixer of ``config``, and whether that very form was measured."""
    if kind == "attention":
        return "attention", True
    if kind == "ssm":
        return "holo without erase", False
    if config.binding == "hadamard":
        return "seed", config.addressing == "position"
    return ("holo" if config.erase else "holo without erase"), True


def step_share(config: HoloConfig, tensor: int = 1) -> tuple[float, bool]:
    """Expected share of the product rate, the harmonic mean over layers, and whether all were measured.

    It was measured on one device, with the kernels that run where ``tensor`` devices divide the model.
    """
    forms = [measured_form(config, kind) for kind in config.layer_kinds]
    seconds = sum(1 / MEASURED_SHARES[name][tensor > 1] for name, _ in forms)
    return len(forms) / seconds, all(measured for _, measured in forms)
