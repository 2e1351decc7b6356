"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOSS_FILE = "loss.png"


def plot_loss(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training loss (every step, and smoothed) and held-out loss over steps.

    Args:
      rows: of ``metrics.jsonl``.
      path: of the PNG.
      title: above the axes.
    """
    # Imported here: it takes a second, and only the end of a run draws.
    from matplotlib.figure import Figure

    trained = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    heldout = [(row["step"], row["heldout_loss"]) for row in rows if row.get("heldout_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="training")
    if heldout:
        steps, losses = zip(*heldout, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if trained or heldout:
        axes.legend()
    figure.savefig(path, dpi=120)


def _smoothed(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """Exponential moving average, started at the first value."""
    average, smooth = values[0], []
    for value in values:
        average += weight * (value - average)
        smooth.append(average)
    return smooth
