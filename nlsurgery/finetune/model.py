"""The classifier as mmengine's Runner sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn


class Classifier(BaseModel):
    """A backbone with a cross-entropy loss.

    Args:
        backbone: An operated classifier: (B, 3, H, W) to (B, classes).
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def init_weights(self) -> None:
        """Do nothing: the Runner would re-initialise pretrained weights here."""
        self._is_init = True

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """Run one of the Runner's modes.

        Args:
            inputs: (B, 3, H, W), normalised.
            labels: (B,) of int64.
            mode: ``loss`` for a dict of losses, ``predict`` for a list with (loss, hit) a sample,
                ``tensor`` for the logits (B, classes).
        """
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        hits = (logits.argmax(1) == labels).float()
        if mode == "loss":
            return {"loss": losses.mean(), "accuracy": hits.mean().detach()}
        return list(torch.stack((losses, hits), 1).detach().cpu())


class Accuracy(BaseMetric):
    """Top-1 accuracy in percent and the mean loss."""

    def __init__(self) -> None:
        super().__init__(prefix="val")
        self.prefix = None  # the evaluator then reports the bare names

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Keep the (loss, hit) pairs of one batch."""
        self.results.extend(tuple(sample.tolist()) for sample in data_samples)

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        """Average over the whole set."""
        total = len(results)
        return {
            "accuracy": 100.0 * sum(hit for _, hit in results) / total,
            "loss": sum(loss for loss, _ in results) / total,
        }


class AutocastWrapper(OptimWrapper):
    """An optimiser wrapper whose forward runs under bf16 autocast, on CPU as well.

    mmengine's own AmpOptimWrapper refuses the CPU; bf16 needs no loss scaling.
    """

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(**options)
        self._device_type = device

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter autocast around the forward of one step."""
        with super().optim_context(model), torch.autocast(self._device_type, torch.bfloat16):
            yield
