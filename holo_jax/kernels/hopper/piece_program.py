"""What walks over the chunks of a piece of a row share: one program for every piece and head (Mosaic GPU).

Warpgroups that walk carry a state from chunk to chunk; others make ahead what does not depend on the state,
and one asks for what chunks need.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from holo_jax.array_types import Array
from holo_jax.kernels import mosaic
from holo_jax.kernels.hopper.chunk_tiles import CHUNK, WIDTH, Products, tile, vector

Refs = dict[str, Any]


class Walk(NamedTuple):
    """What is static about a walk.

    Attributes:
      rows: rows of a call.
      heads: of a row.
      steps: chunks of a piece.
      walked: pieces of a row that are walked.
      skipped: pieces of a row before those.
      stages: chunks that are asked for at a time.
      walkers, makers: warpgroups of a kind.
      dtype: of operands.
      interpret: parameters of Pallas' interpreter, or None.
    """

    rows: int
    heads: int
    steps: int
    walked: int
    skipped: int
    stages: int
    walkers: int
    makers: int
    dtype: Any
    interpret: Any

    @property
    def product(self) -> Products:
        """Products of tiles."""
        return Products(self.interpret is not None)

    def room(self) -> Any:
        """A tile for every stage."""
        return tile(self.dtype, self.stages)

    def numbers(self) -> Any:
        """A vector for every stage."""
        return vector(self.stages)

    def run(
        self,
        body: Callable[..., None],
        operands: tuple[Array, ...],
        name: str,
        out: Any,
        rooms: Refs,
        loaded: int,
    ) -> Array:
        """``body(walk, refs, held)`` in every program; ``loaded`` operands come by chunks."""
        plgpu = mosaic.pallas()
        groups = self.walkers + self.makers + 1
        rooms = (
            dict(
                state=plgpu.SMEM((1, WIDTH, WIDTH), jnp.float32),
                come=plgpu.Barrier(num_arrivals=loaded, num_barriers=self.stages),
                made_come=plgpu.Barrier(num_barriers=self.stages),
                free=plgpu.Barrier(num_arrivals=self.walkers, num_barriers=self.stages),
                start=plgpu.Barrier(),
                done=plgpu.Barrier(num_arrivals=groups),
            )
            | rooms
        )

        def run(*refs: Any, **held: Any) -> None:
            body(self, refs, held)
            # No warpgroup leaves while another multiplies.
            plgpu.barrier_arrive(held["done"])
            plgpu.barrier_wait(held["done"])

        return plgpu.kernel(
            run,
            out_type=out,
            scratch_types=rooms,
            grid=(self.rows * self.walked, self.heads),
            grid_names=("piece", "head"),
            num_threads=groups,
            thread_name="group",
            interpret=self.interpret,
            kernel_name=name,
        )(*operands)

    def place(self) -> tuple[Array, Array, Array, Array]:
        """(row, piece of it, index over rows and pieces walked, head)."""
        index = jax.lax.axis_index("piece")
        row, piece = jax.lax.div(index, self.walked), jax.lax.rem(index, self.walked)
        return row, piece + self.skipped, index, jax.lax.axis_index("head")

    def sources(self, arrays: Refs, *, reverse: bool = False) -> Refs:
        """A program's chunk of each array, from the first of its piece on or from the last back."""
        row, piece, _, head = self.place()

        def source(name: str, ref: Any) -> Callable[[Any], Any]:
            def chunk(n: Any) -> Any:
                positions = self.chunk(piece, self.steps - 1 - n if reverse else n)
                heads_last = len(ref.shape) == 4 and name != "inverse"
                return ref.at[row, positions, head] if heads_last else ref.at[row, head, positions]

            return chunk

        return {name: source(name, ref) for name, ref in arrays.items()}

    def copies(self, held: Refs, sources: dict[str, Any]) -> None:
        """Asks for what every chunk needs as soon as its stage is free."""
        plgpu = mosaic.pallas()

        def ask(n: Any, slot: Any) -> None:
            for name, source in sources.items():
                plgpu.copy_gmem_to_smem(source(n), held[name].at[slot], held["come"].at[slot])

        for n in range(min(self.stages, self.steps)):
            ask(n, n)

        @pl.loop(self.stages, max(self.steps, self.stages))
        def _refill(n: Array) -> None:
            slot = jax.lax.rem(n, self.stages)
            plgpu.barrier_wait(held["free"].at[slot])
            ask(n, slot)

        for n in range(max(self.steps - self.stages, 0), self.steps):
            plgpu.barrier_wait(held["free"].at[n % self.stages])

    def chunk(self, piece: Array, n: Any) -> Any:
        """Positions of a piece's chunk."""
        return pl.ds((piece * self.steps + n) * CHUNK, CHUNK)


def store(held: Refs, which: int, state: Array, out: Any) -> None:
    """A walker's state, float32."""
    plgpu = mosaic.pallas()
    held["state"].at[which][...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(held["state"].at[which], out)
    plgpu.wait_smem_to_gmem(0)
