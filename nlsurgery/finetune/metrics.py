"""What the validation set is scored by."""

from __future__ import annotations

import math
from typing import Any

from mmengine.evaluator import BaseMetric


class Accuracy(BaseMetric):
    """Top-1 accuracy in percent and the mean loss."""

    def __init__(self) -> None:
        super().__init__(prefix="val")
        self.prefix = None  # the evaluator then reports the bare names

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keep the (loss, hit) pairs of one batch."""
        self.results.extend(tuple(sample.tolist()) for sample in data_samples)

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        """Average over the whole set, in an order-independent sum."""
        total = len(results)
        return {
            "accuracy": 100.0 * math.fsum(hit for _, hit in results) / total,
            "loss": math.fsum(loss for loss, _ in results) / total,
        }
