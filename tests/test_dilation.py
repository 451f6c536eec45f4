"""output_stride: the same network as the libraries build, weights kept, and undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import nlsurgery
from nlsurgery.errors import ModelError, RecipeError
from tests.models import TinyResNet
from tests.test_surgery import attributes


def recipe(output_stride: int, *stages: str) -> dict[str, Any]:
    block = {"type": "non_local"}
    inserts = [{"stage": stage, "block": block} for stage in stages or ("res4", "res5")]
    return {"version": 1, "output_stride": output_stride, "inserts": inserts}


def build(spec: str, output_stride: int | None = None) -> nn.Module:
    library, name = spec.split("/")
    if library == "timm":
        options = {} if output_stride is None else {"output_stride": output_stride}
        return timm.create_model(name, num_classes=7, **options).eval()
    dilate = {None: None, 8: [False, True, True], 16: [False, False, True]}[output_stride]
    return torchvision.models.get_model(
        name, weights=None, num_classes=7, replace_stride_with_dilation=dilate
    ).eval()


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    "spec",
    [
        "timm/resnet10t",
        "timm/resnet18",
        "timm/skresnet18",
        "timm/regnety_002",
        pytest.param("timm/efficientnet_b0", marks=pytest.mark.slow),
        "torchvision/resnet50",
    ],
)
def test_equals_what_the_library_builds(spec: str, output_stride: int) -> None:
    reference, model = build(spec, output_stride), build(spec)
    model.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
        nlsurgery.apply(model, recipe(output_stride))
        assert torch.equal(model(x), reference(x))
        assert max(s.reduction for s in nlsurgery.inspect(model).stages) == output_stride
        nlsurgery.remove(model)
        assert torch.equal(model(x), before)


def test_everything_is_undone() -> None:
    model = TinyResNet().eval()
    before = attributes(model)
    nlsurgery.apply(model, recipe(8))
    assert model.layer4[0].conv1.stride == (1, 1)
    assert model.layer4[0].conv2.dilation == (4, 4)
    nlsurgery.remove(model)
    assert attributes(model) == before


def test_copies_and_weights_keep_it() -> None:
    model = nlsurgery.apply(TinyResNet().eval(), recipe(16))
    twin = copy.deepcopy(model)
    assert twin.layer4[0].conv1.stride == (1, 1)
    nlsurgery.remove(twin)
    assert (twin.layer4[0].conv1.stride, model.layer4[0].conv1.stride) == ((2, 2), (1, 1))


def test_plan_and_a_failed_apply_change_nothing() -> None:
    model = TinyResNet().eval()
    before = attributes(model)
    nlsurgery.plan(model, recipe(8))
    assert attributes(model) == before
    with pytest.raises(RecipeError, match="res9"):
        nlsurgery.apply(model, recipe(8, "res9"))
    assert attributes(model) == before


def test_second_recipe_of_the_same_stride_adds_blocks() -> None:
    model = nlsurgery.apply(TinyResNet().eval(), recipe(8, "res4"))
    nlsurgery.apply(model, recipe(8, "res5"))
    assert len(nlsurgery.inserted_blocks(model)) == 2
    assert model.layer4[0].conv2.dilation == (4, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg11", "MaxPool2d of stride 2"),
        ("convnext_atto", "odd kernel"),
        ("vit_tiny_patch16_224", "odd kernel"),
    ],
)
def test_networks_that_down_sample_otherwise_are_refused(name: str, words: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match=words):
        nlsurgery.plan(model, recipe(8, "res3"))


def test_only_8_and_16_are_allowed() -> None:
    with pytest.raises(RecipeError, match="output_stride"):
        nlsurgery.load_recipe(recipe(4))


def test_checkpoint_brings_the_stride_back(tmp_path: Any) -> None:
    model = nlsurgery.apply(TinyResNet().eval(), recipe(8))
    nlsurgery.save(model, tmp_path / "model.safetensors")
    fresh = nlsurgery.load(TinyResNet().eval(), tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
