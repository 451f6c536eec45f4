"""Every block type as a layer of mmengine, built by mmcv's ``build_plugin_layer``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmcv.cnn import build_plugin_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from nlsurgery.blocks import BLOCK_TYPES, NonLocal, block_type, register
from nlsurgery.errors import BlockError
from nlsurgery.integrations.mm_plugins import Stack, layer_name
from tests.integrations.mm_models import assert_same

SHAPE = (2, 16, 6, 5)
#: Options that a block type cannot do without.
OPTIONS: dict[str, dict[str, object]] = {"timm": {"name": "eca"}}


@pytest.fixture(params=sorted(BLOCK_TYPES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_build_plugin_layer_builds_every_block(name: str) -> None:
    config = {"type": f"nlsurgery.{layer_name(name)}", **OPTIONS.get(name, {})}
    attribute, layer = build_plugin_layer(config, postfix="_after", in_channels=16)
    assert attribute == f"nlsurgery_{name}_after"
    plain = block_type(name).build(16, dims=2, **OPTIONS.get(name, {}))
    assert isinstance(layer, type(plain))
    assert list(layer.state_dict()) == list(plain.state_dict())
    x = torch.randn(SHAPE)
    for mode in (True, False):
        assert_same(layer.train(mode)(x), x)


def test_init_weights_of_the_model_around_keeps_identity(name: str) -> None:
    class Host(BaseModule):
        def __init__(self) -> None:
            super().__init__(
                [
                    {"type": "Constant", "val": 1, "layer": ["Conv2d", "_BatchNorm", "LayerNorm"]},
                    {"type": "Constant", "val": 2, "layer": ["GroupNorm", "Linear"]},
                ]
            )
            config = {"type": f"nlsurgery.{layer_name(name)}", **OPTIONS.get(name, {})}
            attribute, layer = build_plugin_layer(config, in_channels=16)
            self.add_module(attribute, layer)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, f"nlsurgery_{name}")(x)

    host = Host()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.fill_(1.0)
    host.init_weights()
    x = torch.randn(SHAPE)
    assert_same(host.train()(x), x)


def test_copies_keep_init_weights(name: str) -> None:
    config = {"type": f"nlsurgery.{layer_name(name)}", "in_channels": 16, **OPTIONS.get(name, {})}
    layer = MODELS.build(config)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        nn.init.constant_(twin.gate, 1.0)
        twin.init_weights()
        x = torch.randn(SHAPE)
        assert_same(twin(x), x)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    layer = MODELS.build({"type": "nlsurgery.NonLocal", "in_channels": 4, "dims": dims})
    x = torch.randn(1, 4, *(4,) * dims)
    assert_same(layer(x), x)


def test_the_scope_is_found_under_another_default_scope() -> None:
    with DefaultScope.overwrite_default_scope("toys"):
        layer = build_plugin_layer({"type": "nlsurgery.NonLocal"}, in_channels=8)[1]
    assert isinstance(layer, NonLocal)


def test_a_stack_runs_all_of_its_blocks() -> None:
    blocks = [{"type": "non_local", "norm": "none"}, {"type": "self_attention", "reduction": 2}]
    attribute, layer = build_plugin_layer(
        {"type": "nlsurgery.Stack", "blocks": blocks}, postfix=1, in_channels=16
    )
    assert attribute == "nlsurgery_stack1"
    assert isinstance(layer, Stack)
    x = torch.randn(SHAPE)
    assert_same(layer(x), x)
    for block in layer:
        nn.init.constant_(block.gate, 0.5)
    expected = layer[1](layer[0](x))
    assert_same(layer(x), expected)
    assert not torch.equal(layer[0](x), x)
    layer.init_weights()
    assert_same(layer(x), x)


def test_a_block_registered_later_is_a_layer_too() -> None:
    @register("plus_gate", source="this test")
    def build(in_channels: int, *, dims: int, factor: int = 1) -> nn.Module:
        return NonLocal(in_channels, factor, dims=dims)

    try:
        layer = MODELS.build({"type": "nlsurgery.PlusGate", "in_channels": 4, "factor": 2})
        assert layer.inter_channels == 2
    finally:
        del BLOCK_TYPES["plus_gate"]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"type": "nlsurgery.NonLocal", "in_channels": 4, "modes": "gaussian"}, "mode"),
        ({"type": "nlsurgery.NonLocal", "in_channels": 4, "mode": "gausian"}, "gaussian"),
        ({"type": "nlsurgery.Stack", "in_channels": 4, "blocks": []}, "at least one"),
        (
            {"type": "nlsurgery.Stack", "in_channels": 4, "blocks": [{"type": "non_locl"}]},
            "non_local",
        ),
    ],
    ids=["option", "value", "empty", "type"],
)
def test_errors_name_the_options(config: dict[str, object], text: str) -> None:
    with pytest.raises(BlockError, match=text):
        MODELS.build(config)
