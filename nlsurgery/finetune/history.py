"""What a run measured, step by step and epoch by epoch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nlsurgery.checkpoint import atomic_write

HISTORY_FILE = "history.json"


@dataclass(slots=True)
class History:
    """The measurements of a run.

    Attributes:
        score: Name of the score that counts, e.g. ``accuracy``; more is better.
        steps: Per sampled step: step, loss, lr.
        scores: Per validation: epoch and the scores; epoch 0 is before the first step.
        gates: Per sampled step: step and the root mean square of every block's gate (γ or the norm's
            weight).
    """

    score: str = "accuracy"
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

    @property
    def best_epoch(self) -> int:
        """The first trained epoch with the best score; 0 before there is one."""
        trained = [row for row in self.scores if row["epoch"] > 0]
        if not trained:
            return 0
        return int(max(trained, key=lambda row: (row[self.score], -row["epoch"]))["epoch"])

    @property
    def stale_epochs(self) -> int:
        """Epochs since the best score."""
        return int(self.scores[-1]["epoch"]) - self.best_epoch if self.scores else 0

    def write(self, folder: Path) -> None:
        """Write ``history.json`` into the work dir."""
        with atomic_write(folder / HISTORY_FILE) as part:
            part.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
