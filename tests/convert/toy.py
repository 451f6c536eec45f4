"""A small ResNet of bottlenecks with torchvision's names, 2-D or 3-D, and its foreign names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.convert.peers import State
from tests.models import trained_looking

#: Blocks in layer1 ... layer4.
DEPTHS = (1, 2, 2, 1)
_PARTS = ("weight", "bias", "running_mean", "running_var")


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dims: int, time: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        step = stride if dims == 2 else (1, stride, stride)
        first = (1, 1) if dims == 2 else (time, 1, 1)
        second = (3, 3) if dims == 2 else (1, 3, 3)
        self.conv1 = conv(channels, width, first, padding=tuple(k // 2 for k in first), bias=False)
        self.bn1 = norm(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(width, width, second, step, tuple(k // 2 for k in second), bias=False)
        self.bn2 = norm(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(width, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                conv(channels, 4 * width, 1, step, bias=False), norm(4 * width)
            )
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        return self.relu3(y + shortcut)


class ToyResNet(nn.Module):
    """``dims=3`` has kernels of ``time`` frames in each block's first convolution."""

    def __init__(self, dims: int = 2, time: int = 1, num_classes: int = 5) -> None:
        super().__init__()
        self.dims = dims
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        kernel, step = (3, 2) if dims == 2 else ((time, 3, 3), (1, 2, 2))
        self.conv1 = conv(3, 8, kernel, step, 1 if dims == 2 else (time // 2, 1, 1), bias=False)
        self.bn1 = norm(8)
        self.relu = nn.ReLU()
        channels = 8
        for index, depth in enumerate(DEPTHS, start=1):
            width = 2 * 2**index
            blocks = []
            for block in range(depth):
                stride = 2 if index > 1 and block == 0 else 1
                blocks.append(Bottleneck(channels, width, stride, dims, time))
                channels = 4 * width
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self, name)(x)
        return self.fc(x.flatten(2).mean(2))


def toy(dims: int = 2, time: int = 1, seed: int = 0) -> ToyResNet:
    """With the weights and statistics of a trained network, in float64."""
    torch.manual_seed(seed)
    return trained_looking(ToyResNet(dims, time), seed).double().eval()


def _pairs(conv: str, norm: str, names: dict[str, str]) -> dict[str, str]:
    """Ours -> theirs for one convolution and the norm behind it."""
    pairs = {f"{conv}.weight": names["conv"]}
    for part in (*_PARTS, "num_batches_tracked"):
        if part in names:
            pairs[f"{norm}.{part}"] = names[part]
    return pairs


def foreign_names(layout: str) -> dict[str, str]:
    """The names of the toy's parameters in a project, written out block by block."""

    def entry(conv: str, norm: str) -> dict[str, str]:
        if layout == "caffe2":
            ends = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
            return {"conv": f"{conv}_w", **{p: f"{norm}_{e}" for p, e in ends.items()}}
        return {
            "conv": f"{conv}.weight",
            **{p: f"{norm}.{p}" for p in (*_PARTS, "num_batches_tracked")},
        }

    stem = {
        "mmcv": ("backbone.conv1", "backbone.bn1"),
        "mmaction2": ("backbone.conv1.conv", "backbone.conv1.bn"),
        "slowfast": ("s1.pathway0_stem.conv", "s1.pathway0_stem.bn"),
        "caffe2": ("conv1", "res_conv1_bn"),
    }[layout]
    names = _pairs("conv1", "bn1", entry(*stem))
    for index, depth in enumerate(DEPTHS, start=1):
        for block in range(depth):
            ours = f"layer{index}.{block}"
            start = {
                "mmcv": f"backbone.{ours}.",
                "mmaction2": f"backbone.{ours}.",
                "slowfast": f"s{index + 1}.pathway0_res{block}.",
                "caffe2": f"res{index + 1}_{block}_",
            }[layout]
            for number, letter in enumerate("abc", start=1):
                conv, norm = {
                    "mmcv": (f"conv{number}", f"bn{number}"),
                    "mmaction2": (f"conv{number}.conv", f"conv{number}.bn"),
                    "slowfast": (f"branch2.{letter}", f"branch2.{letter}_bn"),
                    "caffe2": (f"branch2{letter}", f"branch2{letter}_bn"),
                }[layout]
                theirs = entry(start + conv, start + norm)
                names |= _pairs(f"{ours}.conv{number}", f"{ours}.bn{number}", theirs)
            if block == 0:
                conv, norm = {
                    "mmcv": ("downsample.0", "downsample.1"),
                    "mmaction2": ("downsample.conv", "downsample.bn"),
                    "slowfast": ("branch1", "branch1_bn"),
                    "caffe2": ("branch1", "branch1_bn"),
                }[layout]
                theirs = entry(start + conv, start + norm)
                names |= _pairs(f"{ours}.downsample.0", f"{ours}.downsample.1", theirs)
    head = {
        "mmcv": ("head.fc.weight", "head.fc.bias"),
        "mmaction2": ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias"),
        "slowfast": ("head.projection.weight", "head.projection.bias"),
        "caffe2": ("pred_w", "pred_b"),
    }[layout]
    return {**names, "fc.weight": head[0], "fc.bias": head[1]}


def foreign_state(model: nn.Module, layout: str) -> State:
    """The model's parameters in a project's names; a counter that it lacks is dropped."""
    names = foreign_names(layout)
    return {names[k]: v.clone() for k, v in model.state_dict().items() if k in names}
