"""The surgery on real architectures of timm and torchvision: identity, keys, places, tools."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model

import nlsurgery
from nlsurgery.integrations.hub import create_model
from tests.models import randomise_blocks, trained_looking

FIVE_PLACES = ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]

#: A depth-form recipe that fits every network with at least one live stage.
DEPTHS = {
    "version": 1,
    "inserts": [
        {"stage": -2, "after": {"depth": 1.0}, "block": {"type": "non_local", "sub_sample": True}},
        {"stage": -1, "after": {"depth": 0.5}, "block": {"type": "self_attention"}},
    ],
}
ONE_STAGE = {
    "version": 1,
    "inserts": [
        {"stage": -1, "after": {"depth": [0.25, 0.5, 0.75]}, "block": {"type": "non_local"}}
    ],
}

IMAGE_MODELS = [
    "timm/resnet18", "timm/resnet50", "timm/wide_resnet50_2", "timm/resnext50_32x4d",
    "timm/regnety_002", "timm/convnext_atto", "timm/efficientnet_b0", "timm/mobilenetv3_small_050",
    "timm/densenet121", "timm/vgg11", "timm/swin_tiny_patch4_window7_224",
    "timm/vit_tiny_patch16_224", "timm/deit3_small_patch16_224",
    "torchvision/resnet18", "torchvision/resnet50", "torchvision/regnet_x_400mf",
    "torchvision/convnext_tiny", "torchvision/mobilenet_v3_small", "torchvision/densenet121",
    "torchvision/vgg11_bn", "torchvision/swin_t", "torchvision/vit_b_16",
]  # fmt: skip
VIDEO_MODELS = ["torchvision/r3d_18", "torchvision/mc3_18", "torchvision/r2plus1d_18"]
SLOW_MODELS = [
    "timm/resnet101", "torchvision/resnet101", "torchvision/wide_resnet50_2",
    "torchvision/resnext50_32x4d", "torchvision/efficientnet_b0", "timm/tf_efficientnet_lite0",
    "torchvision/mvit_v2_s", "torchvision/swin3d_t",
]  # fmt: skip


def recipe_for(model: nn.Module) -> dict[str, Any]:
    return DEPTHS if len(nlsurgery.inspect(model).stages) > 1 else ONE_STAGE


def example(spec: str, batch: int = 2) -> Tensor:
    shape = (3, 8, 64, 64) if spec in VIDEO_MODELS else (3, 224, 224)
    if spec in ("torchvision/mvit_v2_s", "torchvision/swin3d_t"):
        shape = (3, 16, 224, 224)
        batch = 1
    return torch.randn(batch, *shape)


@pytest.mark.parametrize(
    "spec",
    [*IMAGE_MODELS, *VIDEO_MODELS, *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW_MODELS)],
)
def test_operated_backbone_computes_the_same_and_learns(spec: str) -> None:
    model = trained_looking(create_model(spec, num_classes=7)).eval()
    x = example(spec)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        original = model(x)
    assert original.std() > 0
    nlsurgery.apply(model, recipe_for(model))
    with torch.no_grad():
        assert torch.equal(model(x), original)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    nlsurgery.verify(model)
    model(x).square().sum().backward()
    for name, block in nlsurgery.inserted_blocks(model).items():
        assert block.gate.grad is not None, name
        assert block.gate.grad.abs().sum() > 0, name
    nlsurgery.remove(model)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_five_blocks_of_resnet50_stand_where_the_paper_says(library: str) -> None:
    model = create_model(f"{library}/resnet50")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nlsurgery.apply(model, "recipes/res4_5blocks.yaml")
    rows = nlsurgery.report(model).insertions
    assert [row.block for row in rows] == FIVE_PLACES
    for row, block in zip(rows, nlsurgery.inserted_blocks(model).values(), strict=True):
        assert block.theta.weight.shape[0] == row.num_chs // 2
    result = model.load_state_dict(before, strict=False)
    assert set(result.missing_keys) == set(nlsurgery.report(model).new_keys)
    assert not result.unexpected_keys


@pytest.fixture(scope="module")
def operated() -> nn.Module:
    model = nlsurgery.apply(create_model("timm/resnet50"), "res4_5blocks").eval()
    randomise_blocks(nlsurgery.inserted_blocks(model), std=0.03)
    with torch.no_grad(), nlsurgery.disabled(model):
        original = model(torch.ones(1, 3, 96, 96))
    assert not torch.equal(model(torch.ones(1, 3, 96, 96)), original)
    return model


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_deepcopy_and_pickle_compute_the_same(operated: nn.Module, image: Tensor) -> None:
    expected = operated(image)
    assert torch.equal(copy.deepcopy(operated)(image), expected)
    assert torch.equal(pickle.loads(pickle.dumps(operated))(image), expected)


def test_compiles_as_one_graph(operated: nn.Module, image: Tensor) -> None:
    compiled = torch.compile(operated, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), operated(image), rtol=1e-5, atol=1e-5)


def test_exports(operated: nn.Module, image: Tensor) -> None:
    program = torch.export.export(operated, (image,))
    torch.testing.assert_close(program.module()(image), operated(image), rtol=1e-4, atol=1e-4)


def test_traces_symbolically(operated: nn.Module, image: Tensor) -> None:
    traced = torch.fx.symbolic_trace(operated)
    torch.testing.assert_close(traced(image), operated(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet50", "convnext_atto", "mobilenetv3_small_050", "densenet121"]
)
def test_features_only_model_takes_blocks(name: str) -> None:
    model = timm.create_model(name, features_only=True).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        before = model(x)
        nlsurgery.apply(model, {"version": 1, "inserts": [
            {"stage": "res4", "block": {"type": "non_local"}}]})  # fmt: skip
        after = model(x)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        randomise_blocks(nlsurgery.inserted_blocks(model))
        changed = model(x)
    assert not torch.equal(changed[-1], before[-1])


def test_feature_extractor_after_the_surgery_runs_the_blocks(image: Tensor) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = nlsurgery.apply(get_model("resnet50"), "res4_1block").eval()
    randomise_blocks(nlsurgery.inserted_blocks(model))
    extracted = create_feature_extractor(model, ["layer3", "fc"])(image)
    torch.testing.assert_close(extracted["fc"], model(image), rtol=1e-5, atol=1e-5)


def test_channels_last_and_gradient_checkpointing_keep_working(image: Tensor) -> None:
    model = create_model("timm/resnet18").eval()
    expected = model.to(memory_format=torch.channels_last)(image)
    nlsurgery.apply(model, recipe_for(model))
    assert torch.equal(model(image), expected)
    model.train()
    model.set_grad_checkpointing()
    model(image).sum().backward()
    assert all(b.gate.grad is not None for b in nlsurgery.inserted_blocks(model).values())


def test_layer_decay_groups_know_the_blocks() -> None:
    from timm.optim import param_groups_layer_decay

    model = nlsurgery.apply(create_model("timm/resnet18"), DEPTHS)
    groups = param_groups_layer_decay(model)
    covered = {id(p) for group in groups for p in group["params"]}
    assert covered == {id(p) for p in model.parameters()}


def test_average_of_weights_runs_its_own_blocks(operated: nn.Module, image: Tensor) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(operated)
    assert torch.equal(averaged(image), operated(image))
    randomise_blocks(nlsurgery.inserted_blocks(averaged.module), seed=5)
    assert not torch.equal(averaged(image), operated(image))


@pytest.mark.slow
def test_onnx_export_gives_the_same_numbers(
    operated: nn.Module, image: Tensor, tmp_path: Any
) -> None:
    onnx_reference = pytest.importorskip("onnx.reference")
    path = tmp_path / "model.onnx"
    torch.onnx.export(operated, (image,), path, dynamo=True, verbose=False)
    (output,) = onnx_reference.ReferenceEvaluator(str(path)).run(None, {"x": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), operated(image), rtol=1e-3, atol=1e-3)


def test_keypoint_head_takes_four_blocks_and_its_detector_stays_the_same(tmp_path):
    def build():
        return get_model("keypointrcnn_resnet50_fpn", weights=None, weights_backbone=None).eval()

    detector = build()
    keys = list(detector.state_dict())
    regions = torch.randn(3, 256, 14, 14)
    head = detector.roi_heads.keypoint_head
    with torch.no_grad():
        before = head(regions)
        nlsurgery.apply(detector, "keypoint_head_4blocks")
        assert torch.equal(head(regions), before)
    places = [f"roi_heads.keypoint_head.{index}" for index in (3, 7, 11, 15)]
    assert [i.block for i in nlsurgery.report(detector).insertions] == places
    assert [i.block for i in nlsurgery.plan(build(), "keypoint_head_4blocks").insertions] == places
    assert set(keys) <= set(detector.state_dict())
    nlsurgery.verify(detector, gradient=True)

    with torch.no_grad():
        for parameter in nlsurgery.inserted_parameters(detector):
            parameter.normal_()
        changed = head(regions)
        assert not torch.equal(changed, before)
        file = nlsurgery.save(detector, tmp_path / "a.safetensors")
        again = nlsurgery.load(build(), file)
        assert torch.equal(again.roi_heads.keypoint_head(regions), changed)
    nlsurgery.remove(detector)
    assert list(detector.state_dict()) == keys


def test_a_window_that_does_not_divide_the_frames_names_its_place() -> None:
    model = get_model("r3d_18")
    block = {"type": "non_local", "temporal_window": 3}
    recipe = {"version": 1, "inserts": [{"stage": "res3", "block": block}]}
    keys = list(model.state_dict())
    message = r"inserts\[0\]\.block at layer2\.1: temporal_window=3 must divide.* which are 4"
    with pytest.raises(nlsurgery.RecipeError, match=message):
        nlsurgery.apply(model, recipe, input_size=(3, 8, 32, 32))
    assert list(model.state_dict()) == keys
