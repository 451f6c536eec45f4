"""Blocks named by their import path: only where the caller allows the import."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

import nlsurgery
from nlsurgery.cli.app import app

BLOCK = """
import torch
from torch import nn

class Shifted(nn.Module):
    def __init__(self, in_channels, offset=1.0):
        super().__init__()
        self.offset = nn.Parameter(torch.full((in_channels, 1, 1), offset))

    def forward(self, x):
        return x + self.offset

number = 3
"""
ALLOWED = ["surgeonsown"]


def recipe(kind: str = "surgeonsown.layers.Shifted", **options: object) -> dict:
    block = {"type": kind, **options}
    return {"version": 1, "inserts": [{"stage": "res4", "after": [0], "block": block}]}


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "site" / "surgeonsown"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "layers.py").write_text(BLOCK)
    (folder / "broken.py").write_text("raise RuntimeError('boom')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "surgeonsown"]:
        del sys.modules[name]


def test_block_by_path_is_the_identity_trains_and_survives_a_round_trip(tmp_path):
    model = timm.create_model("resnet18").eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    nlsurgery.apply(model, recipe(offset=2.0), allow_imports=ALLOWED)
    assert torch.equal(model(x), before)
    block = nlsurgery.inserted_blocks(model)["layer3.0.nlsurgery.0"]
    with torch.no_grad():
        block.gamma.fill_(0.5)
    changed = model(x)
    assert not torch.equal(changed, before)

    path = nlsurgery.save(model, tmp_path / "model.safetensors")
    again = timm.create_model("resnet18").eval()
    state = {key: value.clone() for key, value in again.state_dict().items()}
    with pytest.raises(nlsurgery.RecipeError, match=r"allow_imports=\['surgeonsown'\]"):
        nlsurgery.load(again, path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(nlsurgery.load(again, path, allow_imports=ALLOWED)(x), changed)


@pytest.mark.parametrize("call", [nlsurgery.plan, nlsurgery.apply, nlsurgery.load_recipe])
def test_nothing_is_imported_unless_allowed(call):
    first = () if call is nlsurgery.load_recipe else (timm.create_model("resnet18"),)
    with pytest.raises(nlsurgery.RecipeError, match=r"inserts\[0\].block: .* is not allowed"):
        call(*first, recipe())
    with pytest.raises(nlsurgery.RecipeError, match="is not allowed"):
        call(*first, recipe(), allow_imports=["surgeonsown.other", "surgeons"])
    assert "surgeonsown" not in sys.modules


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (recipe("surgeonsown.layers.Shiftet"), "did you mean 'Shifted'"),
        (recipe("surgeonsown.layers.number"), "it is a int"),
        (recipe("surgeonsown.broken.Block"), "RuntimeError: boom"),
        (recipe("surgeonsown.absent.Block"), "ModuleNotFoundError"),
        (recipe(ofset=1.0), "unexpected keyword argument 'ofset'"),
        (recipe(offset={1, 2}), "must be plain values"),
    ],
    ids=["name", "number", "raises", "absent", "option", "set"],
)
def test_what_cannot_be_built_is_one_error_and_changes_nothing(bad, message):
    model = timm.create_model("resnet18")
    keys = list(model.state_dict())
    with pytest.raises(nlsurgery.RecipeError, match=message):
        nlsurgery.apply(model, bad, allow_imports=ALLOWED)
    assert list(model.state_dict()) == keys


def test_one_name_in_place_of_a_list_is_refused():
    with pytest.raises(nlsurgery.RecipeError, match="must be a list"):
        nlsurgery.load_recipe(recipe(), allow_imports="surgeonsown")


def test_command_line_allows_an_import(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps(recipe()))
    refused = CliRunner().invoke(app, ["plan", "timm/resnet18", str(file)])
    assert refused.exit_code != 0
    options = ["--allow-import", "surgeonsown", "--json"]
    allowed = CliRunner().invoke(app, ["plan", "timm/resnet18", str(file), *options])
    assert allowed.exit_code == 0, allowed.output
    assert json.loads(allowed.stdout)["insertions"][0]["type"] == "surgeonsown.layers.Shifted"
