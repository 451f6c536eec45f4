"""Saving and loading: exact, strict, and nothing changed by a bad file."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import nlsurgery
from nlsurgery.checkpoint import read_state_dict
from nlsurgery.errors import CheckpointError, ModelError
from tests.models import TinyResNet, randomise_blocks, trained_looking

RECIPE = {
    "version": 1,
    "source": "a test",
    "inserts": [
        {"stage": "res3", "after": "all", "block": {"type": "non_local", "sub_sample": True}},
        {"stage": "res4", "block": {"type": "self_attention"}},
    ],
}


@pytest.fixture
def operated() -> nn.Module:
    model = nlsurgery.apply(trained_looking(TinyResNet()).eval(), RECIPE)
    randomise_blocks(nlsurgery.inserted_blocks(model))
    model(torch.randn(4, 3, 64, 64))
    return model


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_whole_model_comes_back_into_a_fresh_one(operated: nn.Module, tmp_path: Path) -> None:
    path = nlsurgery.save(operated, tmp_path / "model.safetensors")
    fresh = TinyResNet().eval()
    assert nlsurgery.load(fresh, path) is fresh
    assert same_state(fresh, operated)
    assert nlsurgery.report(fresh) == nlsurgery.report(operated)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh(x), operated(x))


def test_recipe_travels_inside_as_metadata(operated: nn.Module, tmp_path: Path) -> None:
    path = nlsurgery.save(operated, tmp_path / "model.safetensors")
    with safe_open(path, framework="pt") as file:
        surgery = json.loads(file.metadata()["nlsurgery"])
    assert surgery["applied"][0]["recipe"]["source"] == "a test"
    assert len(surgery["insertions"]) == 3


def test_inserted_parts_alone_hold_buffers_too(operated: nn.Module, tmp_path: Path) -> None:
    path = nlsurgery.save(operated, tmp_path / "blocks.safetensors", inserted_only=True)
    tensors = read_state_dict(path)
    assert set(tensors) == set(nlsurgery.report(operated).new_keys)
    assert any(key.endswith("running_var") for key in tensors)
    fresh = TinyResNet().eval()
    backbone = {key: value.clone() for key, value in fresh.state_dict().items()}
    nlsurgery.load(fresh, path)
    after = fresh.state_dict()
    assert all(torch.equal(after[key], value) for key, value in backbone.items())
    assert all(torch.equal(after[key], value) for key, value in tensors.items())


def test_two_recipes_come_back_in_order(tmp_path: Path) -> None:
    model = TinyResNet()
    for stage in ("res3", "res4"):
        entry = {"stage": stage, "block": {"type": "non_local"}}
        nlsurgery.apply(model, {"version": 1, "inserts": [entry]})
    path = nlsurgery.save(model, tmp_path / "two.safetensors")
    assert same_state(nlsurgery.load(TinyResNet(), path), model)


def test_operated_model_loads_without_a_second_surgery(operated: nn.Module, tmp_path: Path) -> None:
    path = nlsurgery.save(operated, tmp_path / "model.safetensors")
    other = nlsurgery.apply(TinyResNet(), RECIPE)
    assert same_state(nlsurgery.load(other, path), operated)


def state_and_hooks(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {key: value.clone() for key, value in model.state_dict().items()}, hooks


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_recipe(path: Path) -> None:
    save_file(read_state_dict(path), path)


def damaged_recipe(path: Path) -> None:
    save_file(read_state_dict(path), path, {"nlsurgery": "{"})


def lacking_a_key(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.pop("layer1.0.conv1.weight"))


def with_a_foreign_key(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"layer1.0.conv9.weight": torch.ones(1)}))


def with_another_shape(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"fc.weight": torch.ones(7, 128)}))


def rewrite(path: Path, change: object) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = read_state_dict(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(truncated, "cut off", id="truncated"),
        pytest.param(without_recipe, "holds no recipe", id="no-recipe"),
        pytest.param(damaged_recipe, "damaged", id="damaged-recipe"),
        pytest.param(lacking_a_key, r"lacks layer1\.0\.conv1\.weight", id="missing-key"),
        pytest.param(with_a_foreign_key, r"layer1\.0\.conv9\.weight", id="foreign-key"),
        pytest.param(with_another_shape, "other shapes: fc.weight", id="shape"),
        pytest.param(lambda path: path.unlink(), "does not exist", id="missing"),
        pytest.param(lambda path: path.write_text("hello"), "safetensors", id="text"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "operated"])
def test_bad_file_is_one_error_and_changes_nothing(
    operated: nn.Module, tmp_path: Path, damage: object, word: str, fresh: bool
) -> None:
    path = nlsurgery.save(operated, tmp_path / "model.safetensors")
    damage(path)  # type: ignore[operator]
    model = TinyResNet() if fresh else nlsurgery.apply(TinyResNet(), RECIPE)
    before, hooks = state_and_hooks(model)
    with pytest.raises(CheckpointError, match=word) as caught:
        nlsurgery.load(model, path)
    assert "model.safetensors" in str(caught.value)
    after, hooks_after = state_and_hooks(model)
    assert list(before) == list(after)
    assert hooks == hooks_after
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_checkpoint_of_another_model_names_both_sides(operated: nn.Module, tmp_path: Path) -> None:
    path = nlsurgery.save(operated, tmp_path / "model.safetensors")
    deeper = TinyResNet((1, 3, 3, 1))
    with pytest.raises(CheckpointError, match=r"layer2\.2"):
        nlsurgery.load(deeper, path)
    assert not any(".nlsurgery." in key for key in deeper.state_dict())


def test_failed_save_leaves_the_old_file(
    operated: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nlsurgery.save(operated, tmp_path / "model.safetensors")
    old = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nlsurgery.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        nlsurgery.save(operated, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_original_model_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no inserted block"):
        nlsurgery.save(TinyResNet(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_checkpoint_is_read_with_its_wrapping(tmp_path: Path, wrapper: str | None) -> None:
    state = {f"module.{key}": value for key, value in TinyResNet().state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    assert set(read_state_dict(tmp_path / "a.pth")) == set(TinyResNet().state_dict())


@pytest.mark.parametrize(
    ("content", "word"),
    [
        pytest.param({"epoch": 1}, "no state_dict", id="no-tensors"),
        pytest.param(nn.Linear(1, 1), "safely", id="objects"),
    ],
)
def test_unsafe_or_empty_torch_file_is_refused(tmp_path: Path, content: object, word: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=word):
        read_state_dict(tmp_path / "a.pth")


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("made-by-a-checkpoint",)


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch", "plain-pickle"])
def test_file_with_code_names_it_and_gives_no_unsafe_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_torch: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": _Code()}
    if by_torch:
        torch.save(content, "a.pth")
    else:
        Path("a.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="safely") as caught:
        read_state_dict("a.pth")
    assert "weights_only" not in str(caught.value)
    assert not by_torch or "mkdir" in str(caught.value)
    assert not Path("made-by-a-checkpoint").exists()


def test_truncated_torch_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(TinyResNet().state_dict(), path)
    truncated(path)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        read_state_dict(path)
