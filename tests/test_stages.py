"""Stages found in real networks, built on the meta device."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import nlsurgery
from nlsurgery.catalog import registry
from nlsurgery.errors import SelectorError
from nlsurgery.stages import Anatomy


def build(spec: str, **options: Any) -> nn.Module:
    library, name = spec.split("/")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            return timm.create_model(name, **options).eval()
        return torchvision.models.get_model(name, weights=None, **options).eval()


@functools.cache
def anatomy(spec: str) -> Anatomy:
    options = {"weights_backbone": None} if "deeplab" in spec or "lraspp" in spec else {}
    if "inception" in spec:
        options = {"init_weights": False}
    return nlsurgery.inspect(build(spec, **options))


def rows(spec: str) -> list[tuple[str, str, int, str, int]]:
    stages = anatomy(spec).stages
    return [(s.name, s.fqn, s.reduction, s.layout, len(s.blocks)) for s in stages]


EXPECTED = {
    "timm/resnet18": [("stage1", "layer1", 4, "NCHW", 2), ("stage2", "layer2", 8, "NCHW", 2),
                      ("stage3", "layer3", 16, "NCHW", 2), ("stage4", "layer4", 32, "NCHW", 2)],
    "timm/swin_tiny_patch4_window7_224": [
        ("stage1", "layers.0", 4, "NHWC", 2), ("stage2", "layers.1", 8, "NHWC", 2),
        ("stage3", "layers.2", 16, "NHWC", 6), ("stage4", "layers.3", 32, "NHWC", 2)],
    "timm/vit_tiny_patch16_224": [("stage1", "blocks", 16, "NLC", 12)],
    "timm/efficientvit_m0": [
        ("stage1", "stages.0", 16, "NCHW", 5), ("stage2", "stages.1", 32, "NCHW", 2),
        ("stage3", "stages.2", 64, "NCHW", 3)],
    "timm/gcvit_xxtiny": [
        ("stage1", "stages.0.blocks", 4, "NHWC", 2), ("stage2", "stages.1.blocks", 8, "NHWC", 2),
        ("stage3", "stages.2.blocks", 16, "NHWC", 6), ("stage4", "stages.3.blocks", 32, "NHWC", 2)],
    "timm/pit_ti_224": [
        ("stage1", "transformers.0.blocks", 8, "NLC", 2),
        ("stage2", "transformers.1.blocks", 16, "NLC", 6),
        ("stage3", "transformers.2.blocks", 32, "NLC", 4)],
    "timm/crossvit_tiny_240": [("stage1:0", "blocks", 12, "NLC", 3), ("stage1:1", "blocks", 16, "NLC", 3)],
    "timm/coat_lite_tiny": [
        ("stage1", "serial_blocks1", 4, "NLC", 2), ("stage2", "serial_blocks2", 8, "NLC", 2),
        ("stage3", "serial_blocks3", 16, "NLC", 2), ("stage4", "serial_blocks4", 32, "NLC", 2)],
    "timm/ese_vovnet39b": [
        ("stage1", "stages.0", 4, "NCHW", 1), ("stage2", "stages.1", 8, "NCHW", 1),
        ("stage3", "stages.2", 16, "NCHW", 2), ("stage4", "stages.3", 32, "NCHW", 2)],
    "timm/efficientvim_m1": [
        ("stage1", "stages.0.blocks", 16, "NCHW", 2), ("stage2", "stages.1.blocks", 32, "NCHW", 2),
        ("stage3", "stages.2.blocks", 64, "NCHW", 2)],
    "torchvision/shufflenet_v2_x0_5": [
        ("stage2", "stage2", 8, "NCHW", 4), ("stage3", "stage3", 16, "NCHW", 8),
        ("stage4", "stage4", 32, "NCHW", 4)],
    "torchvision/deeplabv3_mobilenet_v3_large": [
        ("stage1", "backbone.1", 2, "NCHW", 1), ("stage2", "backbone.3", 4, "NCHW", 2),
        ("stage3", "backbone.6", 8, "NCHW", 3), ("stage4", "backbone.12", 16, "NCHW", 6),
        ("stage5", "backbone.15", 16, "NCHW", 3)],
    "torchvision/raft_small": [
        ("stage1", "feature_encoder.layer1", 2, "NCHW", 2),
        ("stage2", "feature_encoder.layer2", 4, "NCHW", 2),
        ("stage3", "feature_encoder.layer3", 8, "NCHW", 2)],
}  # fmt: skip


@pytest.mark.parametrize("spec", EXPECTED)
def test_stages_are_the_natural_ones(spec: str) -> None:
    assert rows(spec) == EXPECTED[spec]


def test_parallel_branches_are_stages_of_their_own() -> None:
    found = anatomy("timm/hrnet_w18_small")
    last = [stage for stage in found.stages if stage.fqn == "stage4"]
    assert [stage.branch for stage in last] == [0, 1, 2, 3]
    assert [stage.reduction for stage in last] == [4, 8, 16, 32]
    assert ["res2" in last[0].aliases, "res5" in last[3].aliases] == [True, True]


def test_blocks_on_several_branches_of_one_module() -> None:
    model = build("timm/hrnet_w18_small")
    block = {"type": "non_local"}
    entries = [{"stage": f"stage4:{branch}", "block": block} for branch in (1, 2)]
    nlsurgery.apply(model, {"version": 1, "inserts": entries})
    places = nlsurgery.report(model).insertions
    assert [(row.fqn, row.num_chs) for row in places] == [
        ("stage4.0.nlsurgery.0", 32),
        ("stage4.0.nlsurgery.1", 64),
    ]
    nlsurgery.verify(model)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("timm/resnet26d", {"output_stride": 8}),
        ("timm/skresnet18", {"output_stride": 8}),
        ("timm/efficientnet_b0", {"output_stride": 16}),
        ("torchvision/resnet50", {"replace_stride_with_dilation": [False, True, True]}),
    ],
)
def test_dilated_networks_keep_the_places_of_their_stages(
    spec: str, options: dict[str, Any]
) -> None:
    plain, dilated = anatomy(spec), nlsurgery.inspect(build(spec, **options))
    named = [{alias: s.fqn for s in a.stages for alias in s.aliases} for a in (plain, dilated)]
    for place in ("res2", "res3", "res4", "res5"):
        assert named[0][place] == named[1][place]


@pytest.mark.parametrize(
    ("spec", "place", "live"),
    [
        ("timm/vit_tiny_patch16_224", "blocks.11", "blocks.10"),
        ("timm/deit_tiny_distilled_patch16_224", "blocks.11", "blocks.10"),
        ("timm/pit_ti_224", "transformers.2.blocks.3", "transformers.2.blocks.2"),
        ("torchvision/vit_b_16", "encoder.layers.encoder_layer_11", "encoder.layers.encoder_layer_10"),
    ],
)  # fmt: skip
def test_dead_place_is_refused_with_the_nearest_live_one(spec: str, place: str, live: str) -> None:
    entry: dict[str, Any] = {"stage": place, "block": {"type": "non_local"}}
    model = build(spec)
    with pytest.raises(SelectorError, match=f"nearest live one is {live}\\b"):
        nlsurgery.plan(model, {"version": 1, "inserts": [entry]})
    nlsurgery.plan(model, {"version": 1, "inserts": [{**entry, "stage": live}]})
    nlsurgery.plan(model, {"version": 1, "inserts": [{**entry, "allow_dead": True}]})


def test_last_block_is_live_where_all_tokens_are_read() -> None:
    entry = {"stage": "res4", "block": {"type": "non_local"}}
    for spec in ("timm/cait_xxs24_224", "timm/vit_small_patch16_36x1_224"):
        options = {"global_pool": "avg"} if "36x1" in spec else {}
        nlsurgery.plan(build(spec, **options), {"version": 1, "inserts": [entry]})


#: For each registry entry: a model, and what inspect would say of it without the entry.
REGISTERED = {
    "torchvision.models.optical_flow.raft.RAFT": "torchvision/raft_small",
    "torchvision.models.inception.Inception3": "torchvision/inception_v3",
    "timm.models.hiera.Hiera": "timm/hiera_tiny_224",
}


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_registry_entry_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = REGISTERED[name]
    with_entry = anatomy(spec)
    monkeypatch.setattr("nlsurgery.probe.registered", lambda model: None)
    monkeypatch.setattr("nlsurgery.tree.registered", lambda model: None)
    options = {"init_weights": False} if "inception" in spec else {}
    without = nlsurgery.inspect(build(spec, **options))
    assert (without.input_size, without.stages) != (with_entry.input_size, with_entry.stages)
    assert with_entry.stages
