"""The classifier as mmengine's Runner sees it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from nlsurgery.reporting import inserted_blocks

#: Weight of the extra classifiers that some networks have in training.
_AUXILIARY = 0.3


class Trained(BaseModel):
    """An operated model in the Runner: never re-initialised, its frozen norms kept in eval mode.

    Args:
        backbone: The operated model.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def init_weights(self) -> None:
        """Do nothing: the Runner would re-initialise pretrained weights here."""
        self._is_init = True

    def train(self, mode: bool = True) -> Trained:
        """Set the mode; norms whose parameters are all frozen keep their statistics."""
        super().train(mode)
        if mode:
            for norm in frozen_norms(self.backbone):
                norm.eval()
        return self


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """The norms of the backbone that track statistics and whose parameters are all frozen."""
    inside = {id(m) for block in inserted_blocks(model).values() for m in block.modules()}
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and id(module) not in inside
        and list(module.parameters(recurse=False))
        and not any(p.requires_grad for p in module.parameters(recurse=False))
    ]


class Classifier(Trained):
    """A classifier with a cross-entropy loss."""

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """Run one of the Runner's modes.

        Args:
            inputs: (B, 3, H, W) or (B, 3, T, H, W), normalised.
            labels: (B,) of int64.
            mode: ``loss`` for a dict of losses, ``predict`` for a list with (loss, hit) a sample,
                ``tensor`` for the logits (B, classes).
        """
        logits, *extra = logits_of(self.backbone(inputs))
        if mode == "tensor":
            return logits
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        hits = (logits.argmax(1) == labels).float()
        if mode == "predict":
            return list(torch.stack((losses, hits), 1).detach().cpu())
        loss = losses.mean()
        for other in extra:
            loss = loss + _AUXILIARY * F.cross_entropy(other.float(), labels)
        return {"loss": loss, "accuracy": 100 * hits.mean().detach()}


def logits_of(output: Any) -> list[Tensor]:
    """The logits of a classifier, and of its extra classifiers in training if it has some."""
    if isinstance(output, Tensor):
        return [output]
    return [item for item in output if isinstance(item, Tensor)]
