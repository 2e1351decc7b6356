"""Table and plot of ``eval.scaling``."""

from collections.abc import Mapping
from typing import Any

from eval import plots
from eval.common import cell, markdown_table
from eval.results import Results, Value, exact

_USUAL = (
    ("reshard_after_forward", 1),
    ("reduce_dtype", "float32"),
    ("transport", "collectives"),
    ("in_order", 1),
    ("joined", None),
)
_OF_A_PROGRAM = ("devices", "total_rows", "total_length")


def _case(value: Value) -> tuple:
    return tuple(item for item in value.where.items() if item[0] not in _OF_A_PROGRAM)


def _unusual(where: Mapping[str, Any]) -> str:
    """How the devices of a case send, where it is not the usual way; older results say less."""
    return "".join(f", {name} {where[name]}" for name, usual in _USUAL if where.get(name, usual) != usual)


def table(results: Results) -> str:
    """One line a program."""

    def one(name: str, where: dict[str, Any], digits: int) -> str:
        return next((cell(found, digits) for found in results.select(name, **where)), "")

    rows = []
    for value in results.select("tokens_per_second"):
        where = value.where
        sends = ", ".join(f"{v.where['kind']} {v.value:,.1f}" for v in results.select("sent_mib", **where))
        kind = "strong" if where["strong"] else "weak"
        name = f"{where['axis']} {kind}, {where['total_rows']} x {where['total_length']:,}"
        options = ", ".join(f"{name} {where[name]}" for name in ("remat", "unroll", "overlap", "block"))
        options += _unusual(where)
        profiled = [
            one("exposed_milliseconds", where | {"by": "profile"}, 1),
            one("communication_milliseconds", where, 1),
        ]
        cells = (
            one("milliseconds", where, 1),
            one("efficiency", where, 3),
            one("efficiency_at_once", where, 3),
            one("exposed_milliseconds", where | {"by": "one device"}, 1),
            one("computing_milliseconds", where, 1),
            one("idle_milliseconds", where, 1),
            " of ".join(filter(None, profiled)),
            one("peak_gib", where, 2),
            one("compile_seconds", where, 0),
        )
        rows.append((name, options, where["devices"], cell(value, 0), *cells, sends))
    head = (
        "case",
        "model",
        "devices",
        "tokens/s",
        "ms",
        "efficiency",
        "of devices that do their share at once",
        "ms over one device's share",
        "ms computing",
        "ms idle",
        "ms of collectives alone, of all",
        "planned GiB a device",
        "compile s",
        "MiB received a step",
    )
    return markdown_table(head, rows)


def figures(results: Results, theme: str) -> dict:
    """Efficiency over devices, a line a case."""
    found = results.select("efficiency")
    if not found:
        return {}
    with plots.style(theme):
        figure, axes = plots.grid(size=(10.4, 4.0), title="Train step over devices")
        axis = axes[0][0]
        names = list(dict.fromkeys(map(_case, found)))
        for index, case in enumerate(names):
            values = [v for v in found if _case(v) == case]
            own = values[0].where
            kind = "strong" if own["strong"] else "weak"
            label = f"{own['axis']} {own['length']:,} {kind}"
            label += f", unroll {own['unroll']}, overlap {own['overlap']}"
            label += _unusual(own)
            one = exact("efficiency", 1.0, **{**own, "devices": 1})  # by definition
            plots.line(
                axis,
                [one, *values],
                "devices",
                label=label,
                colour=plots.colour("", index),
                marker=plots.MARKERS[index % 8],
            )
        plots.log_ticks(axis, "x", [1, *(v.where["devices"] for v in found)])
        axis.set_ylim(0, 1.1)
        axis.set_xlabel("devices")
        axis.set_ylabel("tokens/s over devices x one device")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return {"scaling": figure}
