"""``nlsurgery.Surgery`` in a config: the model keeps its class, keys, identity and weights."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

import nlsurgery
from nlsurgery.errors import ModelError, RecipeError
from nlsurgery.walk import CHILD_NAME
from tests.integrations.mm_models import (
    BLOCKS,
    RECIPE,
    ToyClassifier,
    ToyResNet,
    assert_same,
    backbone,
)

IMAGE = (2, 3, 64, 64)
ONE = {
    "version": 1,
    "inserts": [{"stage": "res3", "after": "last", "block": {"type": "self_attention"}}],
}
SECOND = {
    "version": 1,
    "inserts": [{"stage": "res5", "after": "last", "block": {"type": "self_attention"}}],
}


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """mmengine's logger, quiet on the terminal and readable by tests."""
    logger = MMLogger("tests", log_level="INFO")
    logger.handlers = [caplog.handler]
    MMLogger._instance_dict["tests"] = logger
    return caplog


def plain_state(model: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if f".{CHILD_NAME}." not in k}


def open_gates(model: nn.Module) -> None:
    for block in nlsurgery.inserted_blocks(model).values():
        nn.init.constant_(block.gate, 0.5)


def test_a_config_needs_no_import() -> None:
    code = (
        "from mmengine.registry import MODELS\n"
        "m = MODELS.build(dict(type='nlsurgery.Surgery', model='torchvision/resnet18',"
        " recipe='res4_1block'))\n"
        "import nlsurgery; print(list(nlsurgery.inserted_blocks(m)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['model.layer3.0.nlsurgery.0']"


def test_importing_nlsurgery_changes_nothing_of_torch_or_mmengine() -> None:
    code = (
        "import sys, torch\n"
        "before = torch.serialization.get_safe_globals()\n"
        "import nlsurgery\n"
        "assert 'mmengine' not in sys.modules\n"
        "assert torch.serialization.get_safe_globals() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_model_keeps_class_keys_and_values() -> None:
    torch.manual_seed(0)
    model = MODELS.build(backbone())
    torch.manual_seed(0)
    plain = MODELS.build({"type": "toys.ToyResNet"})
    assert isinstance(model, ToyResNet)
    assert tuple(nlsurgery.inserted_blocks(model)) == BLOCKS
    assert_same(list(plain_state(model).values()), list(plain.state_dict().values()))
    assert list(plain_state(model)) == list(plain.state_dict())
    x = torch.randn(IMAGE)
    assert_same(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    "config",
    [
        backbone(),
        {"type": "toys.ToyClassifier", "backbone": backbone()},
        {
            "type": "nlsurgery.Surgery",
            "model": {"type": "toys.ToyClassifier", "backbone": {"type": "toys.ToyResNet"}},
            "recipe": RECIPE,
        },
        {
            "type": "toys.ToyClassifier",
            "backbone": backbone(),
            "init_cfg": [
                {"type": "Constant", "val": 1, "layer": ["_BatchNorm"]},
                {"type": "Normal", "std": 0.1, "layer": ["Conv2d"]},
            ],
        },
        {"type": "nlsurgery.Surgery", "model": "timm/resnet10t", "recipe": ONE},
        {"type": "nlsurgery.Surgery", "model": "torchvision/resnet18", "recipe": "res4_1block"},
    ],
    ids=["backbone", "in_model", "whole", "model_with_init_cfg", "timm", "torchvision"],
)
def test_init_weights_keeps_identity(config: dict[str, Any]) -> None:
    model = MODELS.build(config)
    model.init_weights()
    x = torch.randn(IMAGE)
    for mode in (True, False):
        model.train(mode)
        before = copy.deepcopy(model)
        operated = model(x)
        with nlsurgery.disabled(before):
            assert_same(operated, before(x))
    for block in nlsurgery.inserted_blocks(model).values():
        assert not block.gate.any()
        assert any(p.any() for p in block.parameters())


def test_init_weights_still_initialises_the_backbone() -> None:
    model = MODELS.build(backbone())
    nn.init.zeros_(model.layer1[0].conv1.weight)
    model.init_weights()
    assert model.layer1[0].conv1.weight.any()
    weight = model.layer1[0].conv1.weight.clone()
    open_gates(model)
    model.init_weights()
    assert_same(model.layer1[0].conv1.weight, weight)
    assert all(block.gate.all() for block in nlsurgery.inserted_blocks(model).values())


def test_weights_that_a_hub_has_loaded_survive_init_weights() -> None:
    config = {"type": "nlsurgery.Surgery", "model": "timm/resnet10t", "recipe": ONE}
    model = MODELS.build({"type": "toys.ToyClassifier", "backbone": config})
    before = {k: v.clone() for k, v in plain_state(model.backbone).items()}
    model.init_weights()
    assert_same(list(plain_state(model.backbone).values()), list(before.values()))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A plain checkpoint of a ToyResNet, and one of an operated ToyResNet with open gates."""
    torch.manual_seed(7)
    plain = ToyResNet()
    plain.init_weights()
    operated = nlsurgery.apply(copy.deepcopy(plain), RECIPE)
    open_gates(operated)
    for name, model in (("plain", plain), ("operated", operated)):
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{name}.pth")
    return {name: str(tmp_path / f"{name}.pth") for name in ("plain", "operated")}


@pytest.mark.parametrize("kind", ["plain", "operated"])
@pytest.mark.parametrize("place", ["inner", "outer", "pretrained", "load_from", "load_then_init"])
def test_checkpoints_load_whole(files: dict[str, str], kind: str, place: str) -> None:
    cfg = {"type": "Pretrained", "checkpoint": files[kind]}
    options: dict[str, Any] = {}
    if place == "inner":
        options = {"inner": {"init_cfg": cfg}}
    elif place == "outer":
        options = {"init_cfg": cfg}
    elif place == "pretrained":
        options = {"pretrained": files[kind]}
    model = MODELS.build(backbone(**options))
    if place == "load_then_init":
        load_checkpoint(model, files[kind], logger="current")
        model.init_weights()
        model.load_state_dict(torch.load(files["plain"])["state_dict"], strict=False)
    else:
        model.init_weights()
        if place == "load_from":
            load_checkpoint(model, files[kind], logger="current")
    wanted = torch.load(files[kind])["state_dict"]
    own = model.state_dict()
    assert_same([own[key] for key in wanted], list(wanted.values()))
    gates = [block.gate for block in nlsurgery.inserted_blocks(model).values()]
    assert all(gate.all() if kind == "operated" else not gate.any() for gate in gates)


def test_a_checkpoint_of_the_whole_model_loads_from_outside(tmp_path: Path) -> None:
    whole = {"type": "toys.ToyClassifier", "backbone": {"type": "toys.ToyResNet"}}
    source = MODELS.build(whole)
    source.init_weights()
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "whole.pth")}
    model = MODELS.build(
        {"type": "nlsurgery.Surgery", "model": whole, "recipe": RECIPE, "init_cfg": cfg}
    )
    model.init_weights()
    assert_same(list(plain_state(model).values()), list(source.state_dict().values()))
    x = torch.randn(IMAGE)
    assert_same(model.eval()(x), source.eval()(x))


def test_plain_keys_come_back_by_leaving_out_the_blocks() -> None:
    model = MODELS.build(backbone())
    assert str(ToyResNet().load_state_dict(plain_state(model))) == "<All keys matched successfully>"


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/convnext_atto", "torchvision/resnet18"])
def test_plain_checkpoints_of_a_hub_load_whole(name: str, tmp_path: Path) -> None:
    from nlsurgery.integrations.hub import create_model

    source = create_model(name)
    torch.save(source.state_dict(), tmp_path / "hub.pth")
    cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "hub.pth")}
    model = MODELS.build(
        {
            "type": "nlsurgery.Surgery",
            "model": {"name": name, "init_cfg": cfg},
            "recipe": ONE,
        }
    )
    model.init_weights()
    wanted = {key.replace(".", "_"): value for key, value in source.state_dict().items()}
    own = plain_state(model)
    assert len(own) > 60
    assert_same(
        list(own.values()), [wanted[key.removeprefix("model.").replace(".", "_")] for key in own]
    )


def test_missing_keys_are_told_apart(files: dict[str, str], log: Any, tmp_path: Path) -> None:
    model = MODELS.build(backbone())
    log.clear()
    load_checkpoint(model, files["plain"], logger="current")
    assert "holds none of its 3 inserted blocks" in log.text
    assert "do not match exactly" not in log.text
    state = torch.load(files["operated"])["state_dict"]
    del state["layer3.1.nlsurgery.0.gamma"], state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "lossy.pth")
    log.clear()
    load_checkpoint(model, str(tmp_path / "lossy.pth"), logger="current")
    told = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert any("2 of its 3" in text and "layer3.1.nlsurgery.0" in text for text in told)
    lost = next(text for text in told if "missing keys" in text)
    assert "layer3.1.nlsurgery.0.gamma" in lost
    assert "layer1.0.conv1.weight" in lost
    result = model.load_state_dict(torch.load(files["plain"])["state_dict"], strict=False)
    assert set(result.missing_keys) == set(nlsurgery.report(model).new_keys)


def test_blocks_train_inside_frozen_stages() -> None:
    model = MODELS.build(backbone(inner={"frozen_stages": 2, "norm_eval": True}))
    model.train()
    assert not model.layer2[0].conv1.weight.requires_grad
    assert not model.layer2[0].bn1.training
    assert not model.layer4[0].bn1.training
    blocks = nlsurgery.inserted_blocks(model).values()
    assert all(p.requires_grad for block in blocks for p in block.parameters())
    assert all(module.training for block in blocks for module in block.modules())
    sum(out.square().mean() for out in model(torch.randn(IMAGE))).backward()
    assert all(block.gate.grad.any() for block in blocks)
    for parameter in nlsurgery.inserted_parameters(model):
        parameter.requires_grad_(False)
    model.train()
    assert not any(p.requires_grad for p in nlsurgery.inserted_parameters(model))
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("norm_eval", [False, True])
def test_the_blocks_own_norm_eval(norm_eval: bool) -> None:
    model = MODELS.build(backbone(inner={"norm_eval": True}, norm_eval=norm_eval)).train()
    bn = nlsurgery.inserted_blocks(model)[BLOCKS[0]].bn
    model(torch.randn(IMAGE))
    assert bn.training is not norm_eval
    assert bool(bn.running_mean.any()) is not norm_eval


def test_freeze_backbone_trains_the_blocks_alone() -> None:
    model = MODELS.build(
        {"type": "toys.ToyClassifier", "backbone": backbone(freeze_backbone=True)}
    ).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".nlsurgery." in n or "fc" in n}
    before = {k: v.clone() for k, v in plain_state(model.backbone).items()}
    model(torch.randn(IMAGE))
    assert_same(list(plain_state(model.backbone).values()), list(before.values()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_operated_models_of_their_own(copied: Any) -> None:
    model = MODELS.build(backbone(inner={"frozen_stages": 2}))
    twin = copied(model)
    assert type(twin) is type(model)
    x = torch.randn(IMAGE)
    before = model.eval()(x)
    open_gates(twin)
    assert_same(model(x), before)
    assert not torch.equal(twin.eval()(x)[-1], before[-1])
    assert all(p.requires_grad for p in nlsurgery.inserted_parameters(twin.train()))


def test_two_surgeries_stack() -> None:
    model = MODELS.build({"type": "nlsurgery.Surgery", "model": backbone(), "recipe": SECOND})
    model.init_weights()
    assert len(nlsurgery.inserted_blocks(model)) == len(BLOCKS) + 1


def test_a_data_preprocessor_reaches_the_whole_model() -> None:
    whole = {"type": "toys.ToyClassifier", "backbone": {"type": "toys.ToyResNet"}}
    model = MODELS.build(
        {
            "type": "nlsurgery.Surgery",
            "model": whole,
            "recipe": RECIPE,
            "data_preprocessor": {"type": "ImgDataPreprocessor"},
        }
    )
    assert isinstance(model, ToyClassifier)
    assert type(model.data_preprocessor).__name__ == "ImgDataPreprocessor"


def test_a_config_file_with_tuples_and_a_default_scope(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(
        "recipe = dict(version=1, inserts=[dict(stage='res3', after=(0, 1), "
        "block=dict(type='self_attention', reduction=4))])\n"
        "model = dict(type='nlsurgery.Surgery', model=dict(type='ToyResNet'), recipe=recipe)\n"
        "custom_imports = dict(imports=['nlsurgery.registry'])\n"
    )
    config = Config.fromfile(tmp_path / "config.py")
    with DefaultScope.overwrite_default_scope("toys"):
        model = MODELS.build(config.model)
    assert tuple(nlsurgery.inserted_blocks(model)) == BLOCKS[:2]


@pytest.mark.parametrize(
    ("name", "strides"), [("timm/resnet10t", (8, 32)), ("torchvision/convnext_tiny", (8, 32))]
)
def test_hub_backbones_return_a_pyramid(name: str, strides: tuple[int, int]) -> None:
    indices = (2, 4) if name.startswith("timm") else (1, 3)
    model = MODELS.build(
        {
            "type": "nlsurgery.Surgery",
            "model": {"name": name, "out_indices": indices},
            "recipe": ONE,
        }
    )
    outs = model(torch.randn(1, 3, 64, 64))
    assert [64 // out.shape[-1] for out in outs] == list(strides)
    sum(out.square().mean() for out in outs).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None]
    assert dead == []
    assert len(nlsurgery.inserted_blocks(copy.deepcopy(model))) == 1


def test_a_hub_pyramid_comes_after_the_blocks() -> None:
    model = MODELS.build(
        {
            "type": "nlsurgery.Surgery",
            "model": {"name": "torchvision/resnet18", "out_indices": (1,)},
            "recipe": ONE,
        }
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)[0]
    open_gates(model)
    assert not torch.equal(model(x)[0], before)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"model": {"depth": 50}, "recipe": "res4_1block"}, ModelError, "'type'"),
        ({"model": 3, "recipe": "res4_1block"}, ModelError, "got int"),
        ({"model": "timm/resnet10tt", "recipe": "res4_1block"}, ModelError, "resnet10t"),
        ({"model": "timm/resnet10t", "recipe": 5}, RecipeError, "recipe="),
        ({"model": "timm/resnet10t", "recipe": "res4_1blok"}, RecipeError, "res4_1block"),
        (
            {"model": {"name": "timm/resnet10t", "depth": 3}, "recipe": "res4_1block"},
            ModelError,
            "depth",
        ),
        (
            {
                "model": {"name": "torchvision/resnet18", "out_indices": (4,)},
                "recipe": "res4_1block",
            },
            ModelError,
            "4 stages",
        ),
    ],
    ids=["no_type", "number", "name", "recipe_kind", "recipe_name", "option", "stage"],
)
def test_errors_name_the_way_out(config: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        MODELS.build({"type": "nlsurgery.Surgery", **config})
