"""Fresh arrays inside ``jax.shard_map``: constants do not vary over the mesh, what they join does.

The carry of a scan must have one type. A carry that starts as zeros is the same on every device, and after
one step it is not, so it has to be declared as varying beforehand. Outside ``shard_map`` nothing changes.
"""

from typing import Any

import jax
from jax import lax

Tree = Any


def _axes(x: Any) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def vary_together(tree: Tree) -> Tree:
    """Marks every array of the tree as varying over all mesh axes over which any of them varies."""
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))

    def mark(x: Any) -> Any:
        missing = tuple(sorted(axes - _axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
