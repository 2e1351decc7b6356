"""The tables of docs/scaling.md, from the planner's communication.

``python -m train.planning.scaling`` writes them into the document anew, under their marks.

Three shapes of the default model on 64 to 4,096 devices. Nothing is traced or compiled.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from jax.sharding import AbstractMesh, AxisType

from configs import base
from holo_jax.model import count_parameters
from holo_jax.parallel import TENSOR
from train.model_functions import model_functions
from train.planning.communication import Exchange, exchanges
from train.planning.hardware import H100, step_share
from train.planning.operations import operations_per_token, product_parameters
from train.run_config import RunConfig
from train.sharding import MESH_AXES

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
TOKENS = 32_768  # of a device and step, where it is not the global batch that is fixed
BATCH_TOKENS = 4 * 2**20
ROW = 4096
COUNTS = (64, 256, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A size of the model, and how it is divided inside a node."""

    name: str
    layers: int
    width: int
    hd_dim: int
    fsdp: int


SHAPES = (
    Shape("256M", 12, 1024, 2048, 1),
    Shape("1.3B", 24, 2048, 2048, 8),
    Shape("6.5B", 32, 4096, 4096, 8),
)


def run_config(shape: Shape, rows: int, length: int) -> RunConfig:
    """A run of the default model, in one part a step."""
    config = base.get_config()
    config.global_batch_size, config.context_length, config.accumulation_steps = rows, length, 1
    config.model.num_hidden_layers, config.model.hidden_size = shape.layers, shape.width
    config.model.hd_dim, config.model.vocab_size, config.model.remat = shape.hd_dim, 32_000, "dots"
    return RunConfig.from_dict(config.to_dict())


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on a mesh: seconds of computation, and what is exchanged."""

    compute: float
    sent: list[Exchange]
    parameters: int

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of computation with all communication hidden as far as possible, and with none."""
        seconds = sum(one.seconds for one in self.sent)
        return self.compute / max(self.compute, seconds), self.compute / (self.compute + seconds)


def step(config: RunConfig, sizes: tuple[int, ...]) -> Step:
    """One step of ``config`` on a mesh of ``sizes``."""
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    functions = model_functions(config.model)
    products = product_parameters(functions, config.model)
    operations = operations_per_token(config.model, products, config.context_length)
    devices = math.prod(sizes)
    rate = step_share(config.model, mesh.shape[TENSOR])[0] * H100.product_flops * devices
    compute = config.tokens_per_step * operations / rate
    return Step(compute, exchanges(config, mesh, H100), count_parameters(functions.shapes))


def axis_table() -> Iterator[str]:
    """Each axis alone over the 8 devices of a node, 32,768 tokens a device."""
    yield "| shape | axis | sent by a device | of it a layer | hops | NVLink | InfiniBand | computation |"
    yield "|---|---|---|---|---|---|---|---|"
    for shape in SHAPES:
        for axis, name in enumerate(MESH_AXES):
            sizes = tuple(8 if i == axis else 1 for i in range(4))
            rows = 8 * TOKENS // ROW
            config = run_config(shape, rows, ROW)
            if name == "seq":
                config = run_config(shape, 1, 8 * TOKENS)
            found = step(config, sizes)
            sent = [one for one in found.sent if name in one.axis]
            size, hops = sum(one.bytes for one in sent), sum(one.hops for one in sent)
            count = sum(one.collectives for one in sent)
            cells = [f"{size / 1e9:.2f} GB", f"{size / 1e6 / shape.layers:.0f} MB", str(hops)]
            for link in (H100.inside, H100.between):
                cells.append(f"{link.seconds(size, hops, count) * 1e3:.0f} ms")
            yield f"| {shape.name} | {name} | {' | '.join(cells)} | {found.compute * 1e3:.0f} ms |"


def limit_table() -> Iterator[str]:
    """Where communication takes as long as computation, with nothing hidden."""
    yield "| shape | data 8 / 64 / 8 over fsdp 8 | fsdp 8 / 64 | seq 8 / 64 / 512, states alone | tensor |"
    yield "|---|---|---|---|---|"
    for shape in SHAPES:

        def seconds(sizes: tuple[int, ...], name: str, length: int, shape: Shape = shape) -> Step:
            found = step(run_config(shape, sizes[0] * sizes[1], length * sizes[2]), sizes)
            return dataclasses.replace(found, sent=[one for one in found.sent if name in one.what])

        def tokens(sizes: tuple[int, ...], name: str) -> int:
            # Neither depends on the length, so a token's computation tells how many it takes.
            found = seconds(sizes, name, ROW)
            needed = sum(one.seconds for one in found.sent) / (found.compute / ROW)
            return int(float(f"{needed:.2g}"))

        cells = [
            " / ".join(f"{tokens(sizes, name):,}" for sizes in forms)
            for name, forms in (
                ("gradients, all-reduce", [(8, 1, 1, 1), (64, 1, 1, 1), (8, 8, 1, 1)]),
                ("weights", [(1, 8, 1, 1), (1, 64, 1, 1)]),
                ("state", [(1, 1, 8, 1), (1, 1, 64, 1), (1, 1, 512, 1)]),
            )
        ]
        ways = [n for n in (1, 2, 4, 8) if min(seconds((1, 1, 1, n), "activations", ROW).efficiency) >= 0.5]
        yield f"| {shape.name} | {' | '.join(cells)} | {ways[-1]} |"


def state_table() -> Iterator[str]:
    """What one part of a sequence tells the others, in a layer and row, beside what attention would."""
    yield "| shape | state of a part | keys and values of attention, 32,768 tokens a part |"
    yield "|---|---|---|"
    for shape in SHAPES:
        model = run_config(shape, 1, ROW).model
        state = 4 * (2 * model.phasors * model.hd_dim + model.num_heads * (2 * model.phasors) ** 2)
        cache = 2 * 2 * shape.width * TOKENS
        yield f"| {shape.name} | {state / 2**20:.1f} MiB | {cache / 2**20:.0f} MiB |"


def size_table(fixed_batch: bool) -> Iterator[str]:
    """64 to 4,096 devices, at 32,768 tokens a device or at a fixed global batch."""
    yield (
        "| shape | devices | data x fsdp x seq x tensor | tokens a device | batch | state, GiB a device "
        "| computation | communication | efficiency | 6B tokens |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for shape in SHAPES:
        for devices in COUNTS:
            tokens = BATCH_TOKENS // devices if fixed_batch else TOKENS
            seq = max(1, ROW // tokens)
            sizes = (devices // (shape.fsdp * seq), shape.fsdp, seq, 1)
            config = run_config(shape, tokens * devices // ROW, ROW)
            found = step(config, sizes)
            best, worst = found.efficiency
            seconds = sum(one.seconds for one in found.sent)
            state = 16 * found.parameters / shape.fsdp / 2**30
            minutes = 6e9 / config.tokens_per_step * found.compute / 60
            yield (
                f"| {shape.name} | {devices:,} | {' x '.join(map(str, sizes))} | {tokens:,} "
                f"| {config.tokens_per_step / 2**20:.0f}Mi | {state:.1f} | {found.compute * 1e3:.0f} ms "
                f"| {seconds * 1e3:.0f} ms | {worst:.0%} to {best:.0%} "
                f"| {minutes / best:.1f} to {minutes / worst:.1f} min |"
            )


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "axes": axis_table,
    "limits": limit_table,
    "states": state_table,
    "weak": lambda: size_table(fixed_batch=False),
    "strong": lambda: size_table(fixed_batch=True),
}


def text(name: str) -> str:
    """One of ``TABLES`` as Markdown."""
    return "\n".join(TABLES[name]())


def filled(document: str) -> str:
    """``document`` with each table anew under its mark, ``<!-- NAME -->``."""
    for name in TABLES:
        mark = f"<!-- {name} -->\n"
        before, found, after = document.partition(mark)
        if not found:
            raise ValueError(f"the document has no line {mark.strip()}")
        rest = after.partition("\n\n")[2]
        document = f"{before}{mark}{text(name)}\n\n{rest}"
    return document


def main(argv: list[str] | None = None) -> int:
    """Writes the tables into the document; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments:
        print(f"train.planning.scaling: {arguments[0]} is not expected; it takes nothing", file=sys.stderr)
        return 2
    DOCUMENT.write_text(filled(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
