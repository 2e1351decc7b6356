"""Similarity of position codes, RoPE against random phasors, and the phase error of float32 positions.

A code of position t is the vector ``e^{i w_j t}``, j = 1..m. Two positions at distance D have similarity
``s(D) = (1/m) sum_j cos(w_j D)``, which depends on the distance only. The orthogonality ratio at window W
is the similarity of a code to itself (1) over the mean of |s(D)| at D = 1..W. For random phasors, uniform
on the circle, s(D) is nearly normal with variance 1/(2m), so the ratio tends to ``sqrt(pi m)``; for
several draws the mean is taken over draws and distances before dividing.

The phase error compares ``t * w`` computed in float32 (or rounded to bfloat16), and the exact integer
turns of ``holo_jax.functional.phases_at``, with the same product in float64 or integers.
"""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from eval import common, plots
from eval.common import Reporter, cell, markdown_table
from eval.intervals import bootstrap
from eval.results import Results, Value, exact, theory
from holo_jax.functional.phasors import generate_random_phasors, phases_at, rope_frequencies

CODES = ("rope", "uniform", "normal")
_LABELS = {"rope": "RoPE", "uniform": "random phasors, uniform", "normal": "random phasors, normal"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """See configs/eval/orthogonality.py."""

    components: tuple[int, ...]
    windows: tuple[int, ...]
    draws: int
    rope_base: float
    std: float
    shown: int
    positions: tuple[int, ...]
    frequencies: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("components", "windows", "positions"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it needs positive entries")
        for name in ("draws", "frequencies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.shown not in self.components:
            raise ValueError(f"shown is {self.shown}; it must be one of components {self.components}")
        if max(self.positions) >= 2**24:
            raise ValueError("positions must stay below 2^24, where float32 still holds every integer")


def similarity(phases: jax.Array) -> jax.Array:
    """Mean cosine over the last axis: the similarity of two codes whose phase differences are given."""
    return jnp.mean(jnp.cos(phases), axis=-1)


def rope_similarity(m: int, window: int, base: float) -> np.ndarray:
    """s(D) of RoPE with m frequencies at D = 1..window, float64 in numpy (angles are exact enough)."""
    frequencies = np.asarray(rope_frequencies(m, base), np.float64)
    return np.cos(np.arange(1, window + 1)[:, None] * frequencies).mean(-1)


def random_similarity(key, m: int, window: int, draws: int, distribution: str, std: float) -> np.ndarray:
    """s(D) of ``draws`` random codes at D = 1..window: ``[draws, window]``."""

    @jax.jit
    def compute(key):
        turns = generate_random_phasors(key, (m,), distribution=distribution, std=std)
        distances = jnp.arange(1, window + 1, dtype=jnp.uint32)[None]
        return similarity(phases_at(turns, distances))[0]

    return np.asarray(jax.lax.map(compute, jax.random.split(key, draws), batch_size=16))


def ratio(similarities: np.ndarray, window: int) -> tuple[float, float, float]:
    """Orthogonality ratio ``1 / mean |s|`` over draws and D = 1..window, with its bootstrap interval."""
    per_draw = np.abs(similarities[:, :window]).mean(1)
    return bootstrap(per_draw, statistic=lambda x, axis: 1.0 / x.mean(axis))


def phase_errors(key, position: int, frequencies: int, std: float) -> dict[str, float]:
    """Largest error in radians, on the circle, over random frequencies at one position, by method.

    "float32" and "bfloat16" multiply the position by w ~ N(0, std^2) in that precision; "turns" is the
    exact integer phase. Each is compared with the exact product of its own frequencies.
    """
    normal_key, turns_key = jax.random.split(key)
    omega = std * jax.random.normal(normal_key, (frequencies,), jnp.float32)
    true = float(position) * np.asarray(omega, np.float64)
    naive = jnp.float32(position) * omega
    turns = generate_random_phasors(turns_key, (frequencies,))
    integers = np.asarray(turns, np.uint64) * np.uint64(position) % np.uint64(2**32)
    counted = phases_at(turns, jnp.full((1, 1), position, jnp.uint32))[0, 0]
    pairs = {
        "float32": (naive, true),
        "bfloat16": (naive.astype(jnp.bfloat16), true),
        "turns": (counted, integers.astype(np.float64) * (2 * math.pi / 2**32)),
    }
    errors = {}
    for name, (approximate, reference) in pairs.items():
        difference = np.asarray(approximate, np.float64) - reference
        errors[name] = float(np.abs(np.angle(np.exp(1j * difference))).max())
    return errors


def evaluate(settings: Settings, reporter: Reporter) -> None:
    """Measures ratios, similarity curves and phase errors."""
    key = jax.random.key(settings.seed)
    reporter.steps.expect(len(settings.components) * len(CODES) + len(settings.positions))
    furthest = max(settings.windows)
    for m in settings.components:
        for number, code in enumerate(CODES):
            if code == "rope":
                similarities = rope_similarity(m, furthest, settings.rope_base)[None]
            else:
                code_key = jax.random.fold_in(jax.random.fold_in(key, m), number)
                similarities = random_similarity(code_key, m, furthest, settings.draws, code, settings.std)
            for window in settings.windows:
                if code == "rope":
                    value = 1.0 / float(np.abs(similarities[:, :window]).mean())
                    reporter.add(exact("ratio", value, code=code, components=m, window=window))
                else:
                    reporter.add(
                        Value(
                            "ratio",
                            {"code": code, "components": m, "window": window},
                            *ratio(similarities, window),
                            settings.draws,
                            "bootstrap",
                        )
                    )
            if m == settings.shown:
                for distance in _shown_distances(furthest):
                    size = float(np.abs(similarities[:, distance - 1]).mean())
                    where = {"code": code, "components": m, "distance": distance}
                    reporter.add(
                        exact("similarity", size, **where)
                        if code == "rope"
                        else Value(
                            "similarity",
                            where,
                            *bootstrap(np.abs(similarities[:, distance - 1])),
                            settings.draws,
                            "bootstrap",
                        )
                    )
            reporter.steps.done(f"{code}, {m} components")
        reporter.add(
            theory("ratio", math.sqrt(math.pi * m), code="uniform", components=m, detail="sqrt(pi m)")
        )
    for position in settings.positions:
        errors = phase_errors(
            jax.random.fold_in(key, 10**6 + position), position, settings.frequencies, settings.std
        )
        for method, error in errors.items():
            reporter.add(
                exact("phase_error", error, n=settings.frequencies, method=method, position=position)
            )
        reporter.steps.done(f"phase error at {position}")
    reporter.note(
        "ratio = 1 / mean |similarity| to the nearest W positions (similarity of a code to itself is 1); "
        "phase error = largest over the frequencies drawn, in radians"
    )


def _shown_distances(furthest: int) -> list[int]:
    return sorted({round(d) for d in np.geomspace(1, furthest, 60)})


def table(results: Results) -> str:
    """Ratios by window at the shown size, then phase errors."""
    shown, windows = results.settings["shown"], results.settings["windows"]
    rows = [
        [
            _LABELS[code],
            *(cell(results.one("ratio", code=code, components=shown, window=w), 2) for w in windows),
        ]
        for code in CODES
    ]
    positions = results.settings["positions"]
    errors = [
        [method, *(f"{results.one('phase_error', method=method, position=p).value:.1e}" for p in positions)]
        for method in ("float32", "bfloat16", "turns")
    ]
    return "\n\n".join(
        (
            f"Orthogonality ratio, {shown} components, 95% intervals",
            markdown_table(["code", *(f"W = {w}" for w in windows)], rows),
            "Largest phase error in radians at position t",
            markdown_table(["phase computed in", *(f"t = {p:,}" for p in positions)], errors),
        )
    )


def figures(results: Results, theme: str) -> dict:
    """Similarity by distance, ratio by size, phase error by position."""
    with plots.style(theme):
        figure, axes = plots.grid(1, 3, size=(5.2, 4.2))
        near, size, error = axes[0]
        shown = results.settings["shown"]
        for index, code in enumerate(CODES):
            look = {"label": _LABELS[code], "colour": plots.PALETTE[(1, 0, 2)[index]]}
            plots.line(near, results.select("similarity", code=code), "distance", marker="", **look)
            window = 64 if 64 in results.settings["windows"] else max(results.settings["windows"])
            values = results.select("ratio", source="measured", code=code, window=window)
            plots.line(size, values, "components", marker=plots.MARKERS[index], **look)
        bound = sorted(results.select("ratio", source="theory"), key=lambda v: v.where["components"])
        sizes = [v.where["components"] for v in bound]
        size.plot(
            sizes,
            [v.value for v in bound],
            ls="--",
            lw=1.4,
            zorder=4,
            color=plots.ink(theme),
            label="theory, uniform: sqrt(pi m)",
        )
        near.set(
            xlabel="distance in positions",
            ylabel="mean |similarity|",
            ylim=(0, 1.02),
            title=f"Similarity of neighbours, {shown} components",
        )
        plots.log_ticks(near, "x", [4**k for k in range(6)])
        size.set(
            xlabel="components m",
            ylabel="ratio (higher: better told apart)",
            ylim=(1, 100),
            title=f"Orthogonality ratio, nearest {window} positions",
        )
        plots.log_ticks(size, "x", sizes)
        plots.log_ticks(size, "y", (1, 2, 5, 10, 20, 50, 100), base=10)
        for index, method in enumerate(("float32", "bfloat16", "turns")):
            plots.line(
                error,
                [v for v in results.select("phase_error", method=method) if v.value > 0],
                "position",
                label={"turns": "exact integer turns (ours)"}.get(method, f"{method} product t w"),
                colour=plots.PALETTE[(1, 3, 0)[index]],
                marker=plots.MARKERS[index],
            )
        error.axhline(math.pi, color=plots.muted(theme), lw=1, ls=":")
        error.text(1, math.pi * 1.4, "half a turn: no information", fontsize=9.5, color=plots.muted(theme))
        error.set(
            yscale="log",
            ylim=(3e-8, 30),
            xlabel="position t",
            ylabel="largest error (rad)",
            title="Phase error",
        )
        plots.log_ticks(error, "x", results.settings["positions"], base=10)
        near.legend(loc="upper right")
        size.legend(loc="upper left")
        error.legend(loc="center right", bbox_to_anchor=(1.0, 0.36))
        return {"orthogonality": figure}


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns the exit code."""
    return common.run("orthogonality", Settings, evaluate, figures=figures, table=table, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
