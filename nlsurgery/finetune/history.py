"""What a run measured, step by step and epoch by epoch, and its curves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nlsurgery.checkpoint import atomic_write

HISTORY_FILE = "history.json"
CURVES_FILE = "curves.png"


@dataclass(slots=True)
class History:
    """The measurements of a run.

    Attributes:
        steps: Per optimiser step: step, loss, lr.
        scores: Per validation: epoch, accuracy in percent, loss; epoch 0 is before the first step.
        gates: Per sampled step: step and the root mean square of every block's gate (γ or the norm's
            weight).
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    gates: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def fill(self, data: dict[str, Any]) -> None:
        """Take over the measurements of a saved run."""
        self.steps[:] = data["steps"]
        self.scores[:] = data["scores"]
        self.gates[:] = data["gates"]

    def write(self, folder: Path) -> None:
        """Write ``history.json`` and ``curves.png`` into the work dir."""
        with atomic_write(folder / HISTORY_FILE) as part:
            part.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        with atomic_write(folder / CURVES_FILE) as part:
            self.draw(part)

    def draw(self, path: Path) -> None:
        """Draw loss, accuracy and gates as one PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        loss, score, gate = figure.subplots(1, 3)
        loss.plot([s["step"] for s in self.steps], [s["loss"] for s in self.steps], lw=1)
        loss.set(title="Training loss", xlabel="step", ylabel="cross-entropy", yscale="log")
        score.plot(
            [s["epoch"] for s in self.scores], [s["accuracy"] for s in self.scores], marker="o"
        )
        score.set(title="Validation accuracy", xlabel="epoch", ylabel="%")
        names = [name for name in (self.gates[-1] if self.gates else {}) if name != "step"]
        for name in names:
            gate.plot([g["step"] for g in self.gates], [g[name] for g in self.gates], label=name)
        gate.set(title="Gates: RMS of γ or of the zero BN's weight", xlabel="step")
        if names:
            gate.legend(fontsize=7)
        for axes in (loss, score, gate):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=110, format="png")
