"""Layouts read off shapes, and blocks on every layout against a hand-permuted reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nlsurgery
from nlsurgery.blocks import BLOCK_TYPES
from nlsurgery.shapes import Hints, read_feature
from tests.models import randomise_blocks

IMAGE, LARGER = (2, 3, 64, 64), (2, 3, 128, 192)
VIDEO, VIDEO2 = (2, 3, 8, 64, 64), (2, 3, 8, 128, 192)


@pytest.mark.parametrize(
    ("first", "second", "inputs", "inputs2", "expected"),
    [
        ((2, 16, 8, 8), (2, 16, 16, 24), IMAGE, LARGER, ("NCHW", 16, (8, 8), 8, 0)),
        ((2, 8, 8, 8), (2, 8, 16, 24), IMAGE, LARGER, ("NCHW", 8, (8, 8), 8, 0)),
        ((2, 8, 8, 8), (2, 16, 24, 8), IMAGE, LARGER, ("NHWC", 8, (8, 8), 8, 0)),
        ((2, 64, 64), (2, 384, 64), IMAGE, LARGER, ("NLC", 64, (8, 8), 8, 0)),
        ((2, 65, 64), (2, 385, 64), IMAGE, LARGER, ("NLC", 64, (8, 8), 8, 1)),
        ((2, 69, 64), (2, 389, 64), IMAGE, LARGER, ("NLC", 64, (8, 8), 8, 5)),
        ((2, 64, 64), (2, 64, 384), IMAGE, LARGER, ("NCL", 64, (8, 8), 8, 0)),
        ((2, 8, 4, 8, 8), (2, 8, 4, 16, 24), VIDEO, VIDEO2, ("NCTHW", 8, (4, 8, 8), 8, 0)),
        ((2, 4, 8, 8, 8), (2, 4, 16, 24, 8), VIDEO, VIDEO2, ("NTHWC", 8, (4, 8, 8), 8, 0)),
    ],
    ids=["nchw", "nchw-cube", "nhwc-cube", "nlc", "nlc-cls", "nlc-registers", "ncl", "video",
         "video-channels-last"],
)  # fmt: skip
def test_two_sizes_settle_the_layout(
    first: Any, second: Any, inputs: Any, inputs2: Any, expected: Any
) -> None:
    feature = read_feature(first, inputs, second, inputs2)
    assert feature is not None
    kind, channels, size, reduction, prefix = expected
    assert (feature.layout.kind, feature.num_chs, feature.feature_size) == (kind, channels, size)
    assert (feature.reduction, feature.layout.num_prefix_tokens) == (reduction, prefix)


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [
        ((2, 8, 8, 8), IMAGE),
        ((2, 1, 196, 64), (2, 3, 224, 224)),
        ((2, 1, 64), IMAGE),
        ((2, 10), IMAGE),
        ((8, 16, 8, 8), IMAGE),
    ],
    ids=["cube", "windows", "class-token-alone", "logits", "batch-folded"],
)
def test_one_size_that_leaves_a_choice_is_no_feature_map(shape: Any, inputs: Any) -> None:
    assert read_feature(shape, inputs, None, None) is None


def test_declared_channels_settle_a_cube() -> None:
    hints = Hints(num_chs=frozenset({8}))
    assert read_feature((2, 8, 16, 16), IMAGE, None, None, hints=hints) is not None


def test_stride_of_unpadded_networks_is_the_power_of_two_nearby() -> None:
    feature = read_feature((2, 8, 17, 17), (2, 3, 299, 299), (2, 8, 35, 54), (2, 3, 598, 897))
    assert feature is not None
    assert feature.reduction == 16


def test_tokens_of_unknown_order_are_a_sequence() -> None:
    feature = read_feature((2, 64, 32), IMAGE, (2, 384, 32), LARGER, hints=Hints(sequence=True))
    assert feature is not None
    assert feature.layout.grid is None
    assert feature.layout.dims == 1


def from_nchw_to(kind: str, prefix: Tensor) -> Any:
    """Hand-written maps from (B, C, H, W) to each layout and back, by their index order."""
    return {
        "nchw": (lambda x: x, lambda y, _: y),
        "nhwc": (lambda x: x.permute(0, 2, 3, 1), lambda y, _: y.permute(0, 3, 1, 2)),
        "nlc": (
            lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
            lambda y, s: y.reshape(s[0], s[2], s[3], s[1]).permute(0, 3, 1, 2),
        ),
        "nlc-prefix": (
            lambda x: torch.cat(
                (
                    prefix.expand(x.shape[0], -1, -1),
                    x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
                ),
                1,
            ),
            lambda y, s: (
                y[:, prefix.shape[1] :].reshape(s[0], s[2], s[3], s[1]).permute(0, 3, 1, 2)
            ),
        ),
        "tuple": (
            lambda x: (
                x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
                list(x.shape[2:]),
            ),
            lambda y, s: y[0].reshape(s[0], s[2], s[3], s[1]).permute(0, 3, 1, 2),
        ),
        "list": (lambda x: [x, x[:, :4, ::2, ::2]], lambda y, _: y[0] + y[1].mean()),
    }[kind]


class Layer(nn.Module):
    """x + conv(x), returned in some layout."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.kind = kind
        self.cls = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x: Tensor) -> Any:
        return from_nchw_to(self.kind, self.cls)[0](x + self.conv(x))


class Net(nn.Module):
    """A stem, three layers whose outputs have one layout, and a pooled head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList(Layer(kind) for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = from_nchw_to(self.kind, layer.cls)[1](layer(x), x.shape)
        return self.head(x.mean((2, 3)))


class Reference(nn.Module):
    """The same network with a block called by hand on (B, C, H, W)."""

    def __init__(self, net: Net, block: nn.Module) -> None:
        super().__init__()
        self.net, self.block = net, block

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.stem(x)
        for index, layer in enumerate(net.layers):
            inner = x + layer.conv(x)
            if index == 1:
                changed = self.block(inner)
                inner = changed + inner[:, :4, ::2, ::2].mean() if net.kind == "list" else changed
            elif net.kind == "list":
                inner = inner + inner[:, :4, ::2, ::2].mean()
            x = inner
        return net.head(x.mean((2, 3)))


@pytest.mark.parametrize("block", [{"type": "non_local", "sub_sample": True},
                                   {"type": "self_attention"}], ids=["sub-sampled", "sagan"])  # fmt: skip
@pytest.mark.parametrize("kind", ["nchw", "nhwc", "nlc", "nlc-prefix", "tuple", "list"])
def test_a_block_sees_what_a_hand_permuted_one_sees(kind: str, block: dict[str, Any]) -> None:
    net = Net(kind).eval()
    entry: dict[str, Any] = {"stage": "layers.1", "after": "last", "block": block}
    if kind == "list":
        entry["branch"] = 0
    nlsurgery.apply(net, {"version": 1, "inserts": [entry]}, input_size=(32, 64))
    (inserted,) = nlsurgery.inserted_blocks(net).values()
    randomise_blocks({"": inserted})
    options = {key: value for key, value in block.items() if key != "type"}
    by_hand = BLOCK_TYPES[str(block["type"])].build(8, dims=2, **options).eval()
    by_hand.load_state_dict(inserted.state_dict())
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        expected = Reference(net, by_hand)(x)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
        with nlsurgery.disabled(net):
            assert not torch.allclose(net(x), expected, rtol=1e-3, atol=1e-3)
