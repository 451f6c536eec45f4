"""mmpretrain, mmdet, mmseg and mmaction2 themselves: our configs build, and train a few iterations."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn

import nlsurgery
from nlsurgery.integrations.mm_plugins import all_blocks
from tests.integrations import mmcv_ops
from tests.integrations.mm_models import assert_same
from tests.integrations.mm_runs import KilledError, loader

CONFIGS = Path(__file__).parents[2] / "configs"
PACKAGES = {"mmpretrain": "mmpretrain", "mmdet": "mmdet", "mmseg": "mmseg", "mmaction2": "mmaction"}
FILES = sorted(CONFIGS.glob("*/*.py"))

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # released in 2023, on a torch of today
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Initialisation logs of these libraries run to megabytes."""
    logger = MMLogger("quiet", log_level="ERROR")
    logger.handlers = [logging.NullHandler()]
    MMLogger._instance_dict["quiet"] = logger


def library(name: str) -> Any:
    """Import an OpenMMLab library with mmcv's operators in place."""
    mmcv_ops.provide()
    return pytest.importorskip(
        f"{name}.models", reason=f"{name} is not installed: docs/openmmlab.md"
    )


def offline(model: Any) -> Any:
    """The config of a model without the weights that it would download."""
    model = copy.deepcopy(model)
    inner = model.backbone.get("model", model.backbone)
    if inner.type == "TIMMBackbone":
        inner.pretrained = False
    for holder in (model, inner):
        if "pretrained" in holder and holder.get("type") != "TIMMBackbone":
            holder.pretrained = None
        if holder.type == "ResNetTSM":
            holder.pretrained2d = False
        if holder.get("init_cfg", {}) and holder.init_cfg.get("type") == "Pretrained":
            holder.init_cfg = None
    return model


def test_every_library_has_a_config() -> None:
    assert {file.parent.name for file in FILES} == set(PACKAGES)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(
            file,
            id=f"{file.parent.name}/{file.stem}",
            marks=[] if file.parent.name == "mmpretrain" else pytest.mark.slow,
        )
        for file in FILES
    ],
)
def test_configs_build_and_are_the_identity_at_init(file: Path) -> None:
    library(PACKAGES[file.parent.name])
    config = Config.fromfile(file)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(offline(config.model))
        model.init_weights()
    blocks = all_blocks(model)
    expected = {"nl5": 5, "nl1": 1, "gc-r4": 13, "danet": 1, "ccnet": 1}
    assert len(blocks) == next(n for key, n in expected.items() if f"_{key}_" in file.stem)
    x = torch.randn(*(8, 3, 64, 64) if "tsm" in file.stem else (1, 3, 64, 64))
    if "slowonly" in file.stem:
        x = torch.randn(1, 3, 8, 32, 32)
    model.eval()
    operated = model.backbone(x)
    for block in blocks.values():
        assert not block.gate.any()
    if nlsurgery.inserted_blocks(model):
        with nlsurgery.disabled(model):
            assert_same(model.backbone(x), operated)
    for block in blocks.values():
        nn.init.constant_(block.gate, 0.7)
    assert not torch.equal(last(model.backbone(x)), last(operated))


def last(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else last(value[-1])


def digits_runner(folder: Path, epochs: int = 2, **changes: Any) -> Runner:
    """mmpretrain's classifier on scanned digits, with an operated backbone of mmpretrain."""
    config = {
        "default_scope": "mmpretrain",
        "model": {
            "type": "ImageClassifier",
            "backbone": {
                "type": "nlsurgery.Surgery",
                "model": {"type": "ResNet", "depth": 18, "frozen_stages": 2},
                "recipe": "res4_1block",
            },
            "neck": {"type": "GlobalAveragePooling"},
            "head": {
                "type": "LinearClsHead",
                "num_classes": 10,
                "in_channels": 512,
                "loss": {"type": "CrossEntropyLoss"},
            },
            "data_preprocessor": {"type": "ClsDataPreprocessor"},
        },
        "work_dir": str(folder),
        "train_dataloader": {
            **loader(0, 32, shuffle=True),
            "dataset": {"type": "toys.DigitSamples", "start": 0, "stop": 32},
            "collate_fn": {"type": "toys.stack_samples"},
        },
        "val_dataloader": {
            **loader(32, 48, shuffle=False),
            "dataset": {"type": "toys.DigitSamples", "start": 32, "stop": 48},
            "collate_fn": {"type": "toys.stack_samples"},
        },
        "train_cfg": {"by_epoch": True, "max_epochs": epochs, "val_interval": 1},
        "val_cfg": {},
        "val_evaluator": {"type": "Accuracy"},
        "optim_wrapper": {
            "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
            "constructor": "nlsurgery.OptimWrapperConstructor",
            "paramwise_cfg": {"inserted_lr_mult": 10},
        },
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        "randomness": {"seed": 0},
        "log_level": "ERROR",
        "experiment_name": f"mmpretrain_{folder.name}_{len(list(folder.glob('*')))}",
        **changes,
    }
    return Runner.from_cfg(Config(config))


def test_mmpretrain_trains_on_digits_and_resumes(tmp_path: Path) -> None:
    library("mmpretrain")
    whole = digits_runner(tmp_path / "whole")
    whole.train()
    kill = [{"type": "toys.KillAt", "iteration": 6}]
    with pytest.raises(KilledError):
        digits_runner(tmp_path / "parts", custom_hooks=kill).train()
    rest = digits_runner(tmp_path / "parts", resume=True)
    rest.train()
    assert rest.iter == 8
    assert_same(list(rest.model.state_dict().values()), list(whole.model.state_dict().values()))
    blocks = nlsurgery.inserted_blocks(rest.model)
    assert len(blocks) == 1
    assert all(block.gate.any() for block in blocks.values())
    assert 0 <= rest.message_hub.get_scalar("val/accuracy/top1").current() <= 100


def step(model: nn.Module, data: dict[str, Any], times: int = 2) -> list[float]:
    """Train a few iterations as the Runner does; returns the losses."""
    from mmengine.optim import build_optim_wrapper

    wrapper = build_optim_wrapper(
        model,
        {
            "optimizer": {"type": "SGD", "lr": 1e-3},
            "clip_grad": {"max_norm": 1.0},
            "constructor": "nlsurgery.OptimWrapperConstructor",
        },
    )
    model.train()
    losses = [float(model.train_step(copy.deepcopy(data), wrapper)["loss"]) for _ in range(times)]
    assert all(block.gate.any() for block in all_blocks(model).values())
    assert all(torch.isfinite(torch.tensor(losses)))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["surgery", "plugins"])
def test_mmdet_trains(kind: str) -> None:
    library("mmdet")
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    base = Config.fromfile(CONFIGS / "mmdet" / "mask-rcnn_r50_nl1_fpn_1x_coco.py")
    if kind == "plugins":
        base = Config.fromfile(CONFIGS / "mmdet" / "mask-rcnn_r50_gc-r4_fpn_1x_coco.py")
    config = offline(base.model)
    config.type = "FasterRCNN"
    config.data_preprocessor.pad_mask = False
    config.roi_head.pop("mask_roi_extractor")
    config.roi_head.pop("mask_head")
    config.train_cfg.rcnn.pop("mask_size", None)
    config.roi_head.bbox_roi_extractor.roi_layer.update(use_torchvision=True)
    sample = DetDataSample(metainfo={"img_shape": (96, 96), "scale_factor": (1.0, 1.0)})
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3]))
    data = {"inputs": [torch.randint(0, 255, (3, 96, 96), dtype=torch.uint8)]}
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config)
        model.init_weights()
        step(model, {**data, "data_samples": [sample]})
        found = model.eval().val_step({**data, "data_samples": [sample]})
    assert len(found) == 1
    assert not model.backbone.layer1[0].conv1.weight.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["danet", "ccnet"])
def test_mmseg_trains(stem: str) -> None:
    library("mmseg")
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    base = Config.fromfile(CONFIGS / "mmseg" / f"fcn_r50-d8_{stem}_4xb2-40k_cityscapes-512x1024.py")
    config = offline(base.model)
    config.data_preprocessor.size = (64, 64)
    sample = SegDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64)})
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, 64, 64)))
    data = {"inputs": [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)] * 2}
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config)
        from mmengine.model import revert_sync_batchnorm

        model = revert_sync_batchnorm(model)
        model.init_weights()
        step(model, {**data, "data_samples": [sample, copy.deepcopy(sample)]})


@pytest.mark.slow
def test_mmaction_trains() -> None:
    library("mmaction")
    from mmaction.structures import ActionDataSample

    (file,) = (CONFIGS / "mmaction2").glob("slowonly*.py")
    config = offline(Config.fromfile(file).model)
    sample = ActionDataSample().set_gt_label(7)
    data = {"inputs": [torch.randint(0, 255, (1, 3, 8, 32, 32), dtype=torch.uint8)] * 2}
    with DefaultScope.overwrite_default_scope("mmaction"):
        model = MODELS.build(config)
        model.init_weights()
        step(model, {**data, "data_samples": [sample, copy.deepcopy(sample)]})


def plugin(name: str, postfix: str) -> dict[str, Any]:
    return {
        "cfg": {"type": f"nlsurgery.{name}", "postfix": postfix},
        "stages": (False, True, False, False),
        "position": "after_conv3",
    }


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_two_plugins_at_one_place(scope: str) -> None:
    library(scope)
    plugins = [plugin("NonLocal", "_a"), plugin("SelfAttention", "_b")]
    model = MODELS.build(
        {
            "type": f"{scope}.ResNet",
            "depth": 50,
            "plugins": plugins,
            "init_cfg": [{"type": "Constant", "val": 1, "layer": "_BatchNorm"}],
        }
    )
    model.init_weights()
    block, x = model.layer2[0].eval(), torch.randn(1, 512, 4, 4)
    names = block.after_conv3_plugin_names
    assert names == ["nlsurgery_non_local_a", "nlsurgery_self_attention_b"]
    assert_same(block.forward_plugin(x, names), x)
    for name in names:
        twin = copy.deepcopy(block)
        nn.init.constant_(getattr(twin, name).gate, 1.0)
        acts = not torch.equal(twin.forward_plugin(x, names), x)
        # mmseg 1.2 hands the same input to each and keeps the last one's output.
        assert acts is (scope == "mmdet" or name == names[-1])


def test_docs_list_every_config() -> None:
    text = (CONFIGS.parent / "docs" / "openmmlab.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(configs/\S+\.py)`", text))
    assert listed == {str(file.relative_to(CONFIGS.parent)) for file in FILES}
