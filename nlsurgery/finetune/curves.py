"""The curves of a run as one picture: loss, score, and how far each block has opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nlsurgery.checkpoint import atomic_write
from nlsurgery.finetune.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"
_COLOURS = ("#2f6fde", "#e8590c", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#5c940d", "#495057")
#: Past so many blocks a legend would hide the curves.
_MAX_LABELS = 12


def write_curves(history: History, folder: Path) -> Path:
    """Draw a run's loss, validation score and gates into the work dir.

    Args:
        history: What was measured.
        folder: The work dir.

    Returns:
        The picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, score, gates = figure.subplots(1, 3)
    _draw_loss(loss, history)
    _draw_score(score, history)
    _draw_gates(gates, history)
    for axes in (loss, score, gates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / CURVES_FILE
    with atomic_write(path) as part:
        figure.savefig(part, dpi=110, format="png")
    return path


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to ``width - 1`` before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, place + 1 - width) for place in range(len(values))]
    return [
        (sums[place + 1] - sums[start]) / (place + 1 - start) for place, start in enumerate(starts)
    ]


def _draw_loss(axes: Axes, history: History) -> None:
    steps = [row["step"] for row in history.steps]
    values = [row["loss"] for row in history.steps]
    axes.plot(steps, values, color=_COLOURS[0], alpha=0.3, lw=0.8)
    width = max(1, len(values) // 40)
    axes.plot(steps, smooth(values, width), color=_COLOURS[0], lw=1.6, label="training")
    if steps:
        per_epoch = steps[-1] / max(1.0, history.scores[-1]["epoch"] if history.scores else 1.0)
        scored = [row for row in history.scores if "loss" in row]
        axes.plot(
            [row["epoch"] * per_epoch for row in scored], [row["loss"] for row in scored],
            color=_COLOURS[1], marker="o", ms=4, label="validation",
        )  # fmt: skip
        axes.legend(fontsize=8, frameon=False)
    positive = bool(values) and min(values) > 0
    axes.set(title="Loss", xlabel="step", yscale="log" if positive else "linear")


def _draw_score(axes: Axes, history: History) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history.scores]
    values = [row[history.score] for row in history.scores]
    axes.plot(epochs, values, color=_COLOURS[1], marker="o", ms=4)
    for place in {0, len(values) - 1} if values else ():
        axes.annotate(
            f"{values[place]:.2f}", (epochs[place], values[place]), size=8,
            textcoords="offset points", xytext=(4, 4),
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=f"Validation {history.score}", xlabel="epoch (0: before the first step)")


def _draw_gates(axes: Axes, history: History) -> None:
    names = [name for name in (history.gates[-1] if history.gates else {}) if name != "step"]
    steps = [0.0, *(row["step"] for row in history.gates)]
    for place, name in enumerate(names):
        values = [0.0, *(row[name] for row in history.gates)]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(steps, values, label=name.removesuffix(".nlsurgery.0"), color=colour, lw=1.4)
    if 0 < len(names) <= _MAX_LABELS:
        axes.legend(fontsize=7, frameon=False)
    axes.set(title="Gates: RMS of γ or the zero norm's weight", xlabel="step")
