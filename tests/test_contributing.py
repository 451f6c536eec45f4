"""CONTRIBUTING's example of a new block: its file, its test and its recipe, as they stand there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import yaml

import nlsurgery
from nlsurgery.blocks import BLOCK_TYPES
from nlsurgery.recipe import options_model

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("nlsurgery.blocks.simam")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = dict(BLOCK_TYPES)
    exec(compile(snippets("python")[0], "simam.py", "exec"), module.__dict__)
    yield
    BLOCK_TYPES.clear()
    BLOCK_TYPES.update(known)
    options_model.cache_clear()


@pytest.mark.usefixtures("_registered")
def test_example_block_passes_its_own_test() -> None:
    names: dict[str, object] = {}
    exec(compile(snippets("python")[1], "test_simam.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.usefixtures("_registered")
def test_example_recipe_inserts_the_block() -> None:
    model = timm.create_model("resnet18").eval()
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    nlsurgery.apply(model, yaml.safe_load(snippets("yaml")[0]))
    assert [row.type for row in nlsurgery.report(model).insertions] == ["simam"] * 2
    assert torch.equal(model(x), before)
    assert nlsurgery.inserted_blocks(model)["layer3.0.nlsurgery.0"].regulariser == 0.001


@pytest.mark.usefixtures("_registered")
def test_example_option_is_checked() -> None:
    recipe = yaml.safe_load(snippets("yaml")[0])
    recipe["inserts"][0]["block"]["regularizer"] = 1.0
    with pytest.raises(nlsurgery.RecipeError, match="did you mean 'regulariser'"):
        nlsurgery.load_recipe(recipe)
