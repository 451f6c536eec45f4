"""Listing, grouping and freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nlsurgery
from nlsurgery.errors import ModelError
from tests.models import TinyResNet

RECIPE = {
    "version": 1,
    "inserts": [
        {"stage": "res3", "block": {"type": "non_local"}},
        {"stage": "res4", "block": {"type": "self_attention"}},
    ],
}


@pytest.fixture
def model() -> nn.Module:
    return nlsurgery.apply(TinyResNet(), RECIPE)


def test_inserted_parameters_are_exactly_the_new_ones(model: nn.Module) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in nlsurgery.inserted_parameters(model)}
    assert found == {name for name in names.values() if ".nlsurgery." in name}
    assert len(found) > 8


def test_groups_hold_every_parameter_once_with_its_rate(model: nn.Module) -> None:
    groups = nlsurgery.param_groups(model, 0.1, inserted_lr_mult=10, weight_decay=0.05)
    flat = [p for group in groups for p in group["params"]]
    assert len(flat) == len({id(p) for p in flat}) == len(list(model.parameters()))
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "backbone": (0.1, 0.05),
        "backbone_no_decay": (0.1, 0.0),
        "inserted": (1.0, 0.05),
        "inserted_no_decay": (1.0, 0.0),
    }
    torch.optim.SGD(groups, lr=0.1)


def test_gamma_and_norms_are_not_decayed(model: nn.Module) -> None:
    groups = nlsurgery.param_groups(model, 0.1)
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for block in nlsurgery.inserted_blocks(model).values():
        assert id(block.gate) in undecayed


def test_frozen_backbone_leaves_the_blocks_to_train(model: nn.Module) -> None:
    assert nlsurgery.freeze_backbone(model) is model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".nlsurgery." in name}
    assert {g["name"] for g in nlsurgery.param_groups(model, 0.1)} == {
        "inserted",
        "inserted_no_decay",
    }


@pytest.mark.parametrize(
    "function",
    [
        nlsurgery.inserted_parameters,
        nlsurgery.freeze_backbone,
        lambda m: nlsurgery.param_groups(m, 0.1),
    ],
    ids=["inserted_parameters", "freeze_backbone", "param_groups"],
)
def test_original_model_is_refused(function: object) -> None:
    with pytest.raises(ModelError, match="no inserted block"):
        function(TinyResNet())  # type: ignore[operator]
