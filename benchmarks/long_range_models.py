"""The networks of ``benchmarks/long_range.py``: one pretrained backbone, and what is inserted in it.

The backbone is EfficientNet-Lite0 with its ImageNet weights up to its last stage of stride 16 (the "C4"
part), then a mean over all positions and a linear classifier. On clips every layer works frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

import nlsurgery
from nlsurgery.blocks import NonLocal, register
from nlsurgery.blocks.base import ProjectedBlock
from nlsurgery.blocks.geometry import CONVS
from nlsurgery.integrations.demo import demo_model

VARIANTS = ("none", "non_local", "conv", "se")
#: Stages of stride 8 and 16, the blocks within each that are followed by an insertion, and their channels.
PLACES = ((2, (0, 1), 40), (4, (0, 1, 2), 112))


class PlainConv(ProjectedBlock):
    """z = x + norm(1×1 (ReLU (3×3 (ReLU (1×1 x))))), the norm zero at init; 3×3×3 on clips."""

    def __init__(self, in_channels: int, *, dims: int = 2, width: int = 16) -> None:
        """Build the block.

        Args:
            in_channels: C.
            dims: Spatial dimensions: 1, 2 or 3.
            width: Channels inside.
        """
        super().__init__(in_channels, width, dims, "bn")
        self.squeeze = CONVS[dims](in_channels, width, kernel_size=1)
        self.spatial = CONVS[dims](width, width, kernel_size=3, padding=1)

    def attended(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, width, *spatial)."""
        return cast(Tensor, self.spatial(self.squeeze(x).relu()).relu())


def register_plain_conv() -> None:
    """Let recipes of this process name :class:`PlainConv`, ``plain_conv``; to be called once."""
    register("plain_conv", source="a bottleneck of plain convolutions, for comparison")(PlainConv)


class PerFrame(nn.Module):
    """A 2-D module on every frame of (B, C, T, H, W); images (B, C, H, W) go straight through."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C', T, H', W')."""
        if x.dim() == 4:
            return cast(Tensor, self.module(x))
        batch, _, frames = x.shape[:3]
        y = self.module(x.transpose(1, 2).flatten(0, 1))
        return cast(Tensor, y.unflatten(0, (batch, frames)).transpose(1, 2))


class Backbone(nn.Module):
    """EfficientNet-Lite0 up to stride 16, a mean over positions, and a classifier.

    ``stem`` is everything before the first place of insertion; frozen, it can be run once for all.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        lite = demo_model()
        blocks = cast(nn.Sequential, lite.blocks)
        first = cast(nn.Sequential, blocks[2])
        self.stem = PerFrame(nn.Sequential(lite.conv_stem, lite.bn1, blocks[0], blocks[1]))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(PerFrame(block) for block in cast(nn.Sequential, stage)))
                for stage in (first, blocks[3], blocks[4])
            )
        )
        self.classifier = nn.Linear(112, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W) to (B, num_classes)."""
        return self.head(self.stem(x))

    def groups(self, lr: float, *, backbone_lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: what is new, and what is pretrained and not frozen."""
        new = [*self.classifier.parameters()]
        new += [p for block in inserted(self) for p in block.parameters()]
        known = {id(p) for p in new}
        old = [p for p in self.parameters() if id(p) not in known and p.requires_grad]
        groups = [{"params": new, "lr": lr}]
        return groups + ([{"params": old, "lr": backbone_lr}] if old else [])

    def head(self, features: Tensor) -> Tensor:
        """What follows ``stem``."""
        y = self.stages(features)
        return cast(Tensor, self.classifier(y.mean(tuple(range(2, y.dim())))))


def parameters_of(channels: int, width: int | None, dims: int) -> int:
    """Parameters of a :class:`PlainConv`, or with ``width=None`` of the non-local block."""
    if width is None:
        block: nn.Module = NonLocal(channels, dims=dims)
    else:
        block = PlainConv(channels, dims=dims, width=width)
    return sum(p.numel() for p in block.parameters())


def widths(dims: int) -> Iterator[int]:
    """The width of each plain convolution, so that all together have the non-local blocks' parameters."""
    owed = 0
    for _, after, channels in PLACES:
        for _ in after:
            owed += parameters_of(channels, None, dims)
            best = min(
                range(1, channels), key=lambda w: abs(parameters_of(channels, w, dims) - owed)
            )
            owed -= parameters_of(channels, best, dims)
            yield best


def recipe(variant: str, dims: int) -> dict[str, Any]:
    """The recipe of a variant: five blocks, two at stride 8 and three at stride 16."""
    width = widths(dims)
    inserts = []
    for stage, after, _ in PLACES:
        for index in after:
            block: dict[str, Any] = {"type": variant}
            if variant == "conv":
                block = {"type": "plain_conv", "width": next(width)}
            # `stages` leaves out Lite0's stages 0 and 1, which are the stem.
            inserts.append({"stage": f"stages.{stage - 2}", "after": [index], "block": block})
    return {"version": 1, "source": "benchmarks/long_range.py", "inserts": inserts}


def build(variant: str, frozen: bool, example: Tensor) -> Backbone:
    """Build a variant.

    Args:
        variant: One of :data:`VARIANTS`.
        frozen: Whether the stages' parameters and statistics stay as they are; the stem's always do.
        example: (1, 3, …), the input's shape.
    """
    model = Backbone(2).eval()
    kept = list(model.parameters())
    if variant != "none":
        nlsurgery.apply(model, recipe(variant, example.dim() - 2), example_input=example)
    if frozen:
        for parameter in kept:
            parameter.requires_grad_(False)
        model.classifier.requires_grad_(True)
    model.stem.requires_grad_(False)
    return model


def inserted(model: nn.Module) -> list[nn.Module]:
    """The blocks that the surgery inserted; none where there was no surgery."""
    return list(nlsurgery.inserted_blocks(model).values())


def train_mode(model: Backbone, frozen: bool) -> None:
    """Train mode, in which a frozen backbone's batch normalisation stays in eval mode."""
    model.train(not frozen)
    model.stem.eval()
    for block in inserted(model):
        block.train()
