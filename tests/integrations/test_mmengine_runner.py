"""A whole life in mmengine's Runner: train, watch, save, resume, on real digits."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from mmengine.logging import HistoryBuffer
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import nlsurgery
from nlsurgery.errors import ModelError
from nlsurgery.integrations.mm_checkpoints import allow_runner_checkpoints
from nlsurgery.integrations.mm_hooks import AttentionHook
from tests.integrations.mm_models import BLOCKS, assert_same, backbone
from tests.integrations.mm_runs import KilledError, make_runner

pytestmark = pytest.mark.filterwarnings(
    # mmengine 0.10.7 on a newer torch.
    "ignore:.*torch.cuda.amp.*:FutureWarning",
    "ignore:Detected call of `lr_scheduler.step.*:UserWarning",
    "ignore:.*use_reentrant parameter.*:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf.*:UserWarning",
    "ignore:.*None of the inputs have requires_grad.*:UserWarning",
)


def gates(model: nn.Module) -> dict[str, float]:
    blocks = nlsurgery.inserted_blocks(model)
    return {path: float(block.gate.detach().abs().mean()) for path, block in blocks.items()}


def scalars(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_training_opens_the_gates_and_the_hooks_tell(tmp_path: Path) -> None:
    hooks = [
        {"type": "nlsurgery.GateHook", "interval": 4},
        {"type": "nlsurgery.AttentionHook", "interval": 8, "side": 1},
        {"type": "nlsurgery.AttentionHook", "interval": 1, "phase": "val", "pictures": False},
    ]
    runner = make_runner(tmp_path, custom_hooks=hooks)
    runner.train()
    told = scalars(tmp_path)
    path = f"backbone.{BLOCKS[0]}"
    opened = [(line["step"], line[f"gate/{path}"]) for line in told if f"gate/{path}" in line]
    assert [step for step, _ in opened] == [0, 4, 8]
    assert opened[0][1] == 0.0
    assert opened[2][1] == pytest.approx(gates(runner.model)[path])
    assert all(value > 0 for value in gates(runner.model).values())
    entropies = [
        line[f"attention_entropy/{path}"] for line in told if f"attention_entropy/{path}" in line
    ]
    assert len(entropies) == 2
    assert all(0.5 < value <= 1.0001 for value in entropies)
    pictures = list(tmp_path.glob("*/vis_data/vis_image/*.png"))
    assert sorted(p.name for p in pictures) == [f"attention_backbone.{b}_8.png" for b in BLOCKS]
    assert any("accuracy" in line for line in told)
    assert not any(m._forward_pre_hooks for m in nlsurgery.inserted_blocks(runner.model).values())


def test_attention_in_clips_is_drawn_too() -> None:
    model = torchvision.models.video.r3d_18()
    nlsurgery.apply(model, "res4_1block", input_size=(3, 8, 32, 32))
    drawn: dict[str, tuple[int, ...]] = {}
    visualizer = SimpleNamespace(
        add_scalars=lambda scalars, step: None,
        add_image=lambda name, image, step: drawn.update({name: image.shape}),
    )
    runner = SimpleNamespace(model=model, visualizer=visualizer, iter=0)
    hook = AttentionHook(interval=1, side=2)
    hook.before_train_iter(runner, 0)
    model(torch.randn(2, 3, 8, 32, 32))
    hook.after_train_iter(runner, 0)
    ((name, (height, width, _)),) = drawn.items()
    assert name == "attention_layer3.0.nlsurgery.0"
    # A line of two frames for each of four queries.
    assert 1.6 < height / width < 2.2


def test_resume_after_a_kill_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = make_runner(tmp_path / "whole", epochs=2)
    whole.train()
    kill = [{"type": "toys.KillAt", "iteration": 11}]
    with pytest.raises(KilledError):
        make_runner(tmp_path / "parts", epochs=2, custom_hooks=kill).train()
    rest = make_runner(tmp_path / "parts", epochs=2, resume=True)
    rest.train()
    assert rest.epoch == 2
    assert_same(list(rest.model.state_dict().values()), list(whole.model.state_dict().values()))
    history = rest.message_hub.get_scalar("train/loss")
    assert type(history) is HistoryBuffer
    assert len(history.data[0]) == 16


@pytest.mark.parametrize("operated", [False, True], ids=["plain_run", "operated_run"])
def test_load_from_a_run(tmp_path: Path, operated: bool) -> None:
    inner = {"type": "toys.ToyResNet"}
    model = {"type": "toys.ToyClassifier", "backbone": backbone() if operated else inner}
    first = make_runner(tmp_path / "first", model=model)
    first.train()
    second = make_runner(
        tmp_path / "second", load_from=str(tmp_path / "first" / "epoch_1.pth"), resume=False
    )
    second.load_or_resume()
    own, given = second.model.state_dict(), first.model.state_dict()
    assert_same([own[key] for key in given], list(given.values()))
    assert all(bool(value) is operated for value in gates(second.model).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_hooks": [{"type": "EMAHook"}]},
        {"activation_checkpointing": ["backbone.layer2", "backbone.layer3.1"]},
        pytest.param({"compile": {"backend": "eager"}}, marks=pytest.mark.slow),
        {
            "optim_wrapper": {
                "type": "nlsurgery.CPUAmpOptimWrapper",
                "optimizer": {"type": "SGD", "lr": 0.05},
            }
        },
        {
            "optim_wrapper": {
                "optimizer": {"type": "AdamW", "lr": 1e-3},
                "accumulative_counts": 2,
                "clip_grad": {"max_norm": 1.0},
            }
        },
        {
            "model": {
                "type": "nlsurgery.Surgery",
                "model": {"name": "timm/resnet10t", "num_classes": 10},
                "recipe": {
                    "version": 1,
                    "inserts": [{"stage": "res3", "after": 0, "block": {"type": "non_local"}}],
                },
            }
        },
    ],
    ids=["ema", "checkpointing", "compile", "amp", "accumulation", "hub_classifier"],
)
def test_training_with(tmp_path: Path, changes: dict[str, Any]) -> None:
    runner = make_runner(tmp_path, **changes)
    runner.train()
    assert all(0 < value < 10 for value in gates(runner.model).values())
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=True)["state_dict"]
    assert sum(".nlsurgery." in key for key in saved) == len(
        nlsurgery.report(runner.model).new_keys
    )


def test_ema_keeps_the_blocks(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, custom_hooks=[{"type": "EMAHook", "momentum": 0.5}])
    runner.train()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    path = f"backbone.{BLOCKS[0]}.bn.weight"
    assert saved["ema_state_dict"][f"module.{path}"].any()
    assert not torch.equal(saved["ema_state_dict"][f"module.{path}"], saved["state_dict"][path])


def test_sync_batch_norm_conversion_and_back() -> None:
    model = MODELS.build(backbone())
    for block in nlsurgery.inserted_blocks(model).values():
        nn.init.constant_(block.gate, 0.5)
    x = torch.randn(2, 3, 64, 64)
    before = model.eval()(x)
    converted = convert_sync_batchnorm(model, "torch").eval()
    block = nlsurgery.inserted_blocks(converted)[BLOCKS[0]]
    assert isinstance(block.bn, nn.SyncBatchNorm)
    assert block.gate is block.bn.weight
    after = revert_sync_batchnorm(converted)(x)
    for one, other in zip(after, before, strict=True):  # another kernel may normalise
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    nlsurgery.verify(converted)


def groups_of(model: nn.Module, **paramwise: Any) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group, with the constructor of nlsurgery."""
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "nlsurgery.OptimWrapperConstructor",
            "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.01},
            "paramwise_cfg": paramwise,
        },
    )
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group["params"]
    }


def test_the_constructor_sets_lr_and_decay_of_blocks() -> None:
    model = MODELS.build({"type": "toys.ToyClassifier", "backbone": backbone()})
    groups = groups_of(model, inserted_lr_mult=10, custom_keys={"layer1": {"lr_mult": 0.5}})
    start = f"backbone.{BLOCKS[0]}"
    assert groups[f"{start}.theta.weight"]["lr"] == pytest.approx(1.0)
    assert groups[f"{start}.theta.weight"]["weight_decay"] == 0.01
    assert groups[f"{start}.bn.weight"]["weight_decay"] == 0
    assert groups[f"backbone.{BLOCKS[2]}.gamma"]["weight_decay"] == 0
    assert groups["backbone.layer1.0.conv1.weight"]["lr"] == pytest.approx(0.05)
    assert groups["fc.weight"]["lr"] == 0.1
    assert set(groups) == {name for name, _ in model.named_parameters()}


def test_one_custom_key_reaches_inserted_blocks_and_plugins() -> None:
    model = MODELS.build({"type": "toys.ToyClassifier", "backbone": backbone()})
    plugin = MODELS.build({"type": "nlsurgery.NonLocal", "in_channels": 8})
    model.add_module("nlsurgery_non_local", plugin)
    wrapper = build_optim_wrapper(
        model,
        {
            "optimizer": {"type": "SGD", "lr": 0.1},
            "paramwise_cfg": {"custom_keys": {"nlsurgery": {"lr_mult": 10}}},
        },
    )
    names = {id(p): name for name, p in model.named_parameters()}
    fast = {names[id(g["params"][0])] for g in wrapper.optimizer.param_groups if g["lr"] == 1.0}
    assert fast == {name for name in names.values() if "nlsurgery" in name}
    assert len(fast) == len(nlsurgery.inserted_parameters(model)) + len(list(plugin.parameters()))


def test_freeze_backbone_in_one_line(tmp_path: Path) -> None:
    runner = make_runner(
        tmp_path,
        optim_wrapper={
            "constructor": "nlsurgery.OptimWrapperConstructor",
            "optimizer": {"type": "SGD", "lr": 0.1},
            "paramwise_cfg": {"freeze_backbone": True},
        },
    )
    runner.train()
    fresh = make_runner(tmp_path / "fresh")
    fresh._init_model_weights()
    own, initial = runner.model.state_dict(), fresh.model.state_dict()
    changed = {key for key in own if not torch.equal(own[key], initial[key])}
    assert changed
    assert all(".nlsurgery." in key or key.startswith("fc.") for key in changed)


def test_freezing_a_hub_classifier_leaves_its_head() -> None:
    recipe = {
        "version": 1,
        "inserts": [{"stage": "res3", "after": 0, "block": {"type": "non_local"}}],
    }
    for name, head in (("timm/resnet10t", "model.fc"), ("torchvision/resnet18", "model.fc")):
        model = MODELS.build(
            {
                "type": "nlsurgery.Surgery",
                "model": {"name": name, "num_classes": 3},
                "recipe": recipe,
            }
        )
        trained = set(groups_of(model, freeze_backbone=True))
        assert trained == {
            n for n, _ in model.named_parameters() if ".nlsurgery." in n or n.startswith(head)
        }


@pytest.mark.parametrize(
    ("paramwise", "text"),
    [({"inserted_lr": 10}, "inserted_lr_mult"), ({"freeze_backbone": True}, "holds no block")],
    ids=["option", "plain_model"],
)
def test_constructor_errors(paramwise: dict[str, Any], text: str) -> None:
    model = MODELS.build({"type": "toys.ToyResNet"})
    with pytest.raises(ModelError, match=text):
        groups_of(model, **paramwise)


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (str, "upper")


def test_only_numbers_are_read_from_a_runners_file(tmp_path: Path) -> None:
    allow_runner_checkpoints()
    allow_runner_checkpoints()
    torch.save({"x": _Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bad.pth", weights_only=True)
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"log": buffer, "best": buffer.mean()}, tmp_path / "good.pth")
    loaded = torch.load(tmp_path / "good.pth", weights_only=True)
    assert type(loaded["log"]) is HistoryBuffer
    assert loaded["log"].mean() == loaded["best"] == 1.5
    assert pickle.loads(pickle.dumps(loaded["log"])).max() == 2.0
