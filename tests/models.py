"""Toy backbones: small enough that a test of the surgery takes milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))), optionally strided."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            None
            if stride == 1 and channels == out_channels
            else nn.Conv2d(channels, out_channels, 1, stride, bias=False)
        )
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + shortcut)


class TinyResNet(nn.Module):
    """Four stages of residual blocks at strides 4, 8, 16 and 32, as in a ResNet."""

    def __init__(self, depths: tuple[int, ...] = (1, 2, 3, 1), num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2))
        channels = 8
        for index, depth in enumerate(depths, start=1):
            wide = 8 * 2**index
            blocks = [Residual(channels, wide, 1 if index == 1 else 2)]
            blocks += [Residual(wide, wide) for _ in range(depth - 1)]
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
            channels = wide
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


class SharedActivation(TinyResNet):
    """A network that runs one ReLU after every stage: no place for a block."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.relu(getattr(self, name)(x))
        return self.fc(x.mean((2, 3)))


def trained_looking(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and BatchNorm statistic a random value.

    Zero-initialised heads and residual branches would hide a block that changes something.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.1, generator=generator)
            elif value.is_floating_point() and value.dim() <= 1:
                value.uniform_(0.5, 1.0, generator=generator)
            elif value.is_floating_point() and not value.any():
                value.normal_(0, 0.02, generator=generator)
    return model


def randomise_blocks(blocks: dict[str, nn.Module], seed: int = 0, std: float = 0.3) -> None:
    """Move inserted blocks away from the identity, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in blocks.values():
            for parameter in block.parameters():
                parameter.normal_(0, std, generator=generator)
