"""The look of every plot: one style in a light and a dark theme, one colour and marker per model."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from eval.results import Value

_INK = {"light": "#1f2430", "dark": "#e7e9ee"}
_MUTED = {"light": "#667085", "dark": "#9aa3b2"}
_GRID = {"light": "#e4e7ec", "dark": "#323844"}
_PAPER = {"light": "#ffffff", "dark": "#14171d"}

# Distinguishable in common colour blindness, mid-lightness so that both themes carry them.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a6d9", "#7b61c4", "#8a6d5b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MODELS = ("holo", "attention", "ssm", "holo_sum", "dual", "seed", "holo_decay", "holo_anchor")

SEQUENTIAL = LinearSegmentedColormap.from_list(
    "recall", ["#7f1d3f", "#d2603a", "#f2c14e", "#8fc7a1", "#1b7f79"]
)


def themes() -> tuple[str, ...]:
    """Names of the themes."""
    return tuple(_INK)


def _style(theme: str) -> dict:
    if theme not in _INK:
        raise ValueError(f"theme is {theme!r}; it must be one of {', '.join(_INK)}")
    return {
        "figure.facecolor": _PAPER[theme],
        "axes.facecolor": _PAPER[theme],
        "savefig.facecolor": _PAPER[theme],
        "text.color": _INK[theme],
        "axes.labelcolor": _INK[theme],
        "axes.edgecolor": _MUTED[theme],
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 11,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GRID[theme],
        "grid.linewidth": 0.8,
        "xtick.color": _MUTED[theme],
        "ytick.color": _MUTED[theme],
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        "lines.markersize": 6,
        "font.size": 11,
        "font.family": "DejaVu Sans",
        "figure.titlesize": 14,
        "figure.titleweight": "bold",
        "svg.fonttype": "path",
    }


@contextlib.contextmanager
def style(theme: str = "light"):
    """Context in which figures have the project's look."""
    with mpl.rc_context(_style(theme)):
        yield


def muted(theme: str) -> str:
    """Colour of secondary lines and text."""
    return _MUTED[theme]


def ink(theme: str) -> str:
    """Colour of primary text."""
    return _INK[theme]


def grid(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (5.4, 4.0), title: str = "", **options
) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows x columns`` axes of ``size`` inches each; call inside ``style``."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure, axes


def colour(name: str, index: int = 0) -> str:
    """Colour of a model by name; of anything else by index."""
    return PALETTE[(_MODELS.index(name) if name in _MODELS else index) % len(PALETTE)]


def marker(name: str, index: int = 0) -> str:
    """Marker of a model by name; of anything else by index."""
    return MARKERS[(_MODELS.index(name) if name in _MODELS else index) % len(MARKERS)]


def short(number: float) -> str:
    """A number for an axis: 512, 4k, 64k, 1M (powers of two count 1024 to the k)."""
    number = float(number)
    for unit, suffix in ((2**20, "M"), (10**6, "M"), (2**10, "k"), (10**3, "k")):
        if number >= unit and number % unit == 0:
            return f"{number / unit:.0f}{suffix}"
    return f"{number:g}"


def log_ticks(axis, which: str, ticks: Sequence[float], base: int = 2) -> None:
    """A logarithmic x or y axis with exactly these ticks, labelled as plain numbers."""
    ticks = sorted(set(ticks))
    getattr(axis, f"set_{which}scale")("log", base=base)
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(FixedLocator(ticks))
    scale.set_major_formatter(FixedFormatter([short(t) for t in ticks]))
    scale.set_minor_locator(NullLocator())


def line(
    axis, values: Sequence[Value], x: str, *, label: str, colour: str, marker: str = "o", **options
) -> None:
    """Draws values over ``where[x]`` with intervals (a band; bars without a line); absent: crosses."""
    present = sorted((v for v in values if v.status == "ok"), key=lambda v: v.where[x])
    xs = [v.where[x] for v in present]
    ys = [v.value for v in present]
    ranged = bool(present) and all(v.low is not None for v in present)
    if ranged and options.get("ls") == "none":
        spread = [[v.value - v.low for v in present], [v.high - v.value for v in present]]
        axis.errorbar(xs, ys, yerr=spread, label=label, color=colour, marker=marker, capsize=2.5, **options)
    else:
        axis.plot(xs, ys, label=label, color=colour, marker=marker, **options)
        if ranged:
            lows, highs = [v.low for v in present], [v.high for v in present]
            axis.fill_between(xs, lows, highs, color=colour, alpha=0.18, lw=0)
    for value in values:
        if value.status != "ok":
            axis.plot([value.where[x]], [0], marker="x", ms=9, mew=2, color=colour, clip_on=False, zorder=5)


def heatmap(
    axis, table: Sequence[Sequence[Value | None]], rows: Sequence, columns: Sequence, *, theme: str
) -> object:
    """Draws proportions as coloured cells with their numbers; absent cells are hatched and named."""
    numbers = np.array(
        [[v.value if v is not None and v.status == "ok" else np.nan for v in row] for row in table]
    )
    image = axis.imshow(np.ma.masked_invalid(numbers), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            if value is None or value.status != "ok":
                axis.add_patch(
                    mpl.patches.Rectangle(
                        (j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor=_MUTED[theme], lw=0
                    )
                )
                text, shade = ("-" if value is None else value.status.upper()), _INK[theme]
            else:
                text, shade = (
                    f"{100 * value.value:.0f}",
                    "#ffffff" if not 0.4 < value.value < 0.85 else "#1f2430",
                )
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color=shade)
    return image


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG (or what the suffix says)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def svg(figure: Figure) -> str:
    """The figure as an SVG document without date or random ids, so that equal plots are equal bytes."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "holo-jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
