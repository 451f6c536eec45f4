"""OpenMMLab-style models on mmengine alone: what the libraries' own do to inserted blocks, in small."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS, Registry
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.models import Residual

RECIPE = {
    "version": 1,
    "inserts": [
        {"stage": "res3", "after": "all", "block": {"type": "non_local", "norm": "bn"}},
        {"stage": "res4", "after": "last", "block": {"type": "self_attention", "reduction": 4}},
    ],
}
BLOCKS = ("layer2.0.nlsurgery.0", "layer2.1.nlsurgery.0", "layer3.1.nlsurgery.0")

TOYS = Registry("model", parent=MODELS, scope="toys", locations=["tests.integrations.mm_models"])


@TOYS.register_module()
class ToyResNet(BaseModule):
    """A backbone with the habits of mmdet's ResNet: frozen stages, norm_eval, init_cfg over all layers."""

    def __init__(
        self, frozen_stages: int = -1, norm_eval: bool = False, init_cfg: Any = None
    ) -> None:
        init_cfg = init_cfg or [
            {"type": "Kaiming", "layer": "Conv2d"},
            {"type": "Constant", "val": 1, "layer": "_BatchNorm"},
        ]
        super().__init__(init_cfg)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2))
        channels = 8
        for index in (1, 2, 3, 4):
            wide = 8 * 2**index
            stride = 1 if index == 1 else 2
            blocks = [Residual(channels, wide, stride), Residual(wide, wide)]
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
            channels = wide
        self._freeze_stages()

    def _freeze_stages(self) -> None:
        for index in range(1, self.frozen_stages + 1):
            stage = getattr(self, f"layer{index}")
            stage.eval()
            for parameter in stage.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> ToyResNet:
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        out = []
        for index in (1, 2, 3, 4):
            x = getattr(self, f"layer{index}")(x)
            out.append(x)
        return tuple(out)


@TOYS.register_module()
class ToyClassifier(BaseModel):
    """A whole model: backbone, pooling, linear head."""

    def __init__(
        self,
        backbone: Any,
        num_classes: int = 10,
        data_preprocessor: Any = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        logits = self.fc(self.backbone(inputs)[-1].mean((2, 3)))
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, data_samples)}
        if mode == "predict":
            return [
                {"pred_label": score.argmax(), "gt_label": label}
                for score, label in zip(logits, data_samples, strict=True)
            ]
        return logits


def backbone(**options: Any) -> dict[str, Any]:
    """The config of an operated ToyResNet; ``inner`` options go to the ToyResNet."""
    inner = {"type": "toys.ToyResNet", **options.pop("inner", {})}
    return {"type": "nlsurgery.Surgery", "model": inner, "recipe": RECIPE, **options}


def flat(value: Any) -> list[Tensor]:
    """Every tensor in an output."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)]


def assert_same(one: Any, other: Any) -> None:
    """Two outputs agree to the last bit."""
    pairs = list(zip(flat(one), flat(other), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
