"""Probing: nothing stays on the model, odd inputs, and recurrent layers without their steps."""

from __future__ import annotations

import time
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import nlsurgery
from nlsurgery.errors import SurgeryError
from nlsurgery.probe import probe
from tests.test_surgery import attributes

RECIPE = {"version": 1, "inserts": [{"stage": -2, "block": {"type": "non_local"}}]}


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "resnet18"])
def test_nothing_is_left_on_the_model(name: str) -> None:
    model = timm.create_model(name).eval()
    before = attributes(model)
    nlsurgery.plan(model, RECIPE)
    assert attributes(model) == before
    nlsurgery.remove(nlsurgery.apply(model, RECIPE))
    assert attributes(model) == before


def test_users_hooks_are_not_run() -> None:
    seen: list[Any] = []
    model = timm.create_model("resnet10t").eval()
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output))
    nlsurgery.inspect(model)
    assert seen == []


def test_recurrent_layers_are_not_stepped_through() -> None:
    with torch.device("meta"):
        model = timm.create_model("sequencer2d_s").eval()
    started = time.process_time()
    stages = nlsurgery.inspect(model).stages
    assert [stage.layout for stage in stages] == ["NHWC"] * 4
    assert time.process_time() - started < 10


def test_recurrent_shape_is_what_the_layer_gives() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 5, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.lstm(x.flatten(2).transpose(1, 2))
            return y

    net = Net()
    trace = probe(net, (3, 8, 8)).trace
    assert trace.outputs[0].shape == tuple(net(torch.randn(2, 3, 8, 8)).shape)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("inception_v3", (3, 299, 299)),
        ("swin3d_t", (3, 16, 224, 224)),
        ("r3d_18", (3, 16, 112, 112)),
    ],
)
def test_input_is_the_one_the_network_is_made_for(name: str, size: tuple[int, ...]) -> None:
    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    assert nlsurgery.inspect(model).input_size == size


def test_second_size_is_dropped_where_the_model_resizes_its_input() -> None:
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.interpolate(x, (64, 64))).mean((2, 3))

    assert probe(Resizing(), (3, 64, 64)).second is None


def test_registry_entry_with_an_unknown_field_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from nlsurgery import catalog

    (tmp_path / "x.yaml").write_text(
        "version: 1\nmodel: a.B\nreason: because it has to be\nfoo: 1\n"
    )
    monkeypatch.setattr(catalog, "data_folder", lambda name: tmp_path)
    catalog.registry.cache_clear()
    try:
        with pytest.raises(SurgeryError, match=r"registry/x\.yaml"):
            catalog.registry()
    finally:
        catalog.registry.cache_clear()


@pytest.mark.slow
def test_apply_is_fast_and_takes_no_second_model() -> None:
    recipe = nlsurgery.load_recipe("res4_5blocks")
    nlsurgery.apply(timm.create_model("resnet50"), recipe)
    builds, applies = [], []
    for _ in range(3):
        started = time.process_time()
        model = timm.create_model("resnet50")
        builds.append(time.process_time() - started)
        started = time.process_time()
        nlsurgery.apply(model, recipe)
        applies.append(time.process_time() - started)
    assert min(applies) < 0.5 * min(builds) + 0.3


class AsksForAValue(nn.Module):
    """Reshapes by a number that it reads off a tensor."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.conv = nn.Conv2d(3, 4, 1)
        self.table = nn.Parameter(torch.arange(40.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        places = torch.arange(x.shape[3], device=x.device).view(1, -1).expand(2, -1)
        if self.source == "written":
            places = places.clone()
            places[:, -1] = x.new_zeros(())
        chosen = {
            "positions": places + 1,
            "written": places + 1,
            "input": x,
            "weights": self.table[:8],
            "random": torch.randint(9, (3,), device=x.device),
        }[self.source]
        return y.reshape(y.shape[0], 4, -1, int(chosen.max().item()))


def test_a_value_that_follows_from_the_shapes_is_known():
    model = AsksForAValue("positions")
    assert probe(model, (3, 6, 8)).trace.outputs[0].shape == (2, 4, 6, 8)


@pytest.mark.parametrize("source", ["written", "input", "weights", "random"])
def test_a_value_that_follows_from_more_is_an_error(source):
    with pytest.raises(SurgeryError, match="item"):
        probe(AsksForAValue(source), (3, 6, 8))
