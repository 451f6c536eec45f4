"""Places inside blocks, in feature extractors, and hooks that survive other tools."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import nlsurgery
from nlsurgery.errors import ModelError, VerifyError
from tests.models import TinyResNet, randomise_blocks, trained_looking

BLOCK = {"type": "non_local"}


def recipe(**entry: Any) -> dict[str, Any]:
    return {"version": 1, "inserts": [{"block": BLOCK, **entry}]}


def meta(spec: str, **options: Any) -> nn.Module:
    library, name = spec.split("/")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name, **options).eval()
        return torchvision.models.get_model(name, weights=None).eval()


@pytest.mark.parametrize(
    ("spec", "at", "host"),
    [
        ("timm/resnet50", "bn3", "layer3.5.bn3"),
        ("timm/resnet50", "*.bn3", "layer3.5.bn3"),
        ("timm/resnet50", "after_conv1", "layer3.5.bn1"),
        ("timm/resnet50", "after_conv3", "layer3.5.bn3"),
        ("timm/resnet50", "before_add", "layer3.5.bn3"),
        ("timm/seresnet50", "before_add", "layer3.5.se"),
        ("timm/resnet18", "after_conv2", "layer3.1.bn2"),
        ("timm/resnet18", "after_conv3", "layer3.1.bn2"),
        ("torchvision/resnet34", "after_conv3", "layer3.5.bn2"),
        ("timm/resnet18", "before_add", "layer3.1.bn2"),
        ("torchvision/resnet50", "after_conv2", "layer3.5.bn2"),
        ("torchvision/resnet50", "before_add", "layer3.5.bn3"),
        ("torchvision/resnet18", "before_add", "layer3.1.bn2"),
        ("torchvision/r3d_18", "before_add", "layer3.1.conv2.1"),
        ("timm/regnety_002", "after_conv3", "s3.b4.conv3.bn"),
    ],
)
def test_place_inside_a_block_by_name_and_role(spec: str, at: str, host: str) -> None:
    plan = nlsurgery.plan(meta(spec), recipe(stage="res4", at=at))
    assert plan.insertions[0].fqn == f"{host}.nlsurgery.0"


@pytest.mark.parametrize("number", [0, 1], ids=["down-sampling", "plain"])
def test_shortcut_is_no_role(number: int) -> None:
    plan = nlsurgery.plan(
        meta("timm/resnet26d"), recipe(stage="res4", at="before_add", after=number)
    )
    assert plan.insertions[0].fqn == f"layer3.{number}.bn3.nlsurgery.0"


def operated(model: nn.Module, **entry: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """An operated model with moved blocks, an image, and what it gives."""
    nlsurgery.apply(model, recipe(**entry))
    randomise_blocks(nlsurgery.inserted_blocks(model))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return model, image, model(image)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("resnet10t", {"stage": "res4", "at": "before_add"}),
        ("vgg11_bn", {"stage": "features.12", "after": "last"}),
    ],
    ids=["inside-a-block", "bare-batchnorm"],
)
def test_sync_batchnorm_conversion_keeps_the_block(name: str, entry: dict[str, Any]) -> None:
    model, image, before = operated(trained_looking(timm.create_model(name)).eval(), **entry)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    with torch.no_grad():
        # The inserted norm is converted too, and then no longer folds into its projection.
        torch.testing.assert_close(converted(image), before, rtol=1e-4, atol=1e-4)
    nlsurgery.verify(converted, input_size=(64, 64))


@pytest.mark.parametrize("path", ["layer3.2.bn2"])
def test_fused_host_is_an_error_at_verify_and_at_the_next_forward(path: str) -> None:
    model, image, _ = operated(trained_looking(TinyResNet()).eval(), stage="res4", at="bn2")
    fused = torch.ao.quantization.fuse_modules(model, [[path.replace("bn2", "conv2"), path]])
    with pytest.raises(VerifyError, match="bn2"):
        nlsurgery.verify(fused)
    with pytest.raises(VerifyError, match="bn2"):
        fused(image)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("resnet10t", {"feature_cls": "dict"}),
        ("efficientnet_b0", {}),
        ("efficientnet_b0", {"feature_cls": "hook"}),
        ("vit_tiny_patch16_224", {"feature_cls": "getter", "img_size": 64}),
        ("convnext_atto", {}),
    ],
    ids=["list", "dict", "list-blocks", "hook", "getter", "convnext"],
)
def test_features_only_models_take_blocks(name: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained_looking(timm.create_model(name, features_only=True, **options)).eval()
    image = torch.randn(1, 3, 64, 64)
    after: Any = {"depth": 0.5} if "vit" in name else "last"
    with torch.no_grad():
        before = list(_maps(model(image)))
        nlsurgery.apply(model, recipe(stage="res4", after=after), input_size=(64, 64))
        assert all(map(torch.equal, before, _maps(model(image))))
        randomise_blocks(nlsurgery.inserted_blocks(model))
        assert not torch.equal(before[-1], list(_maps(model(image)))[-1])
    nlsurgery.verify(model)


def _maps(output: Any) -> Any:
    return output.values() if isinstance(output, dict) else output


def test_features_of_an_operated_model_include_the_block() -> None:
    from timm.models import FeatureHookNet, FeatureListNet

    for wrap in (FeatureListNet, FeatureHookNet):
        model, image, _ = operated(
            trained_looking(timm.create_model("resnet10t")).eval(), stage="res4"
        )
        with torch.no_grad():
            wanted = model.layer3(model.layer2(model.layer1(_stem(model, image))))
            maps = wrap(model, out_indices=(3,))(image)
        assert torch.equal(maps[0], wanted)


def _stem(model: Any, x: Tensor) -> Tensor:
    return model.maxpool(model.act1(model.bn1(model.conv1(x))))


def test_feature_extractor_after_the_surgery_runs_the_block() -> None:
    net = torchvision.models.resnet18()
    model, image, _ = operated(trained_looking(net).eval(), stage="res4")
    extract = create_feature_extractor(model, ["layer3", "flatten"]).eval()
    getter = IntermediateLayerGetter(model, {"layer3": "out"})
    with torch.no_grad():
        assert torch.equal(extract(image)["layer3"], getter(image)["out"])
        with nlsurgery.disabled(model):
            plain = getter(image)["out"]
        assert not torch.equal(plain, getter(image)["out"])


def test_feature_extractor_before_the_surgery_names_the_way_out() -> None:
    extract = create_feature_extractor(TinyResNet().eval(), ["layer3"])
    with pytest.raises(ModelError, match="operate on the original model, then extract"):
        nlsurgery.apply(extract, recipe(stage="res4"))


def test_intermediate_layer_getter_takes_blocks() -> None:
    net = trained_looking(torchvision.models.resnet18()).eval()
    model = IntermediateLayerGetter(net, {"layer4": "out"})
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)["out"]
        nlsurgery.apply(model, recipe(stage="res4"), input_size=(64, 64))
        assert torch.equal(model(image)["out"], before)
    nlsurgery.verify(model)


def test_quantisable_float_model_takes_blocks_and_an_integer_one_does_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.quantization.resnet18(quantize=False).eval()
        nlsurgery.plan(model, recipe(stage="res4"))
        linear = torch.ao.quantization.quantize_dynamic(TinyResNet().eval(), {nn.Linear})
    with pytest.raises(ModelError, match="quantised"):
        nlsurgery.plan(linear, recipe(stage="res4"))


def test_verify_by_gradient_passes_and_sees_a_cut() -> None:
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    model = nlsurgery.apply(trained_looking(TinyResNet()).eval(), recipe(stage="res4"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nlsurgery.verify(model, gradient=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    model.layer4.insert(0, Detached())
    with pytest.raises(VerifyError, match="no gradient reaches it"):
        nlsurgery.verify(model, gradient=True)


def test_verify_says_that_only_the_class_token_is_read() -> None:
    entry = {"stage": "blocks", "after": "last", "allow_dead": True}
    model = nlsurgery.apply(timm.create_model("vit_tiny_patch16_224", depth=2), recipe(**entry))
    with pytest.raises(VerifyError, match="no output of the model depends"):
        nlsurgery.verify(model)
