"""The blocks of every packaged recipe can be built and start as the identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from nlsurgery.blocks import BLOCK_TYPES, block_type

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_blocks_of_a_recipe_start_as_the_identity(path):
    torch.manual_seed(0)
    recipe = yaml.safe_load(path.read_text())
    assert recipe["version"] == 1
    assert recipe["source"]
    for insert in recipe["inserts"]:
        options = dict(insert["block"])
        block = block_type(options.pop("type")).build(64, dims=2, **options)
        x = torch.randn(2, 64, 6, 5)
        assert torch.equal(block(x), x)


def test_every_block_type_but_the_article_s_has_a_recipe():
    used = {
        insert["block"]["type"]
        for path in RECIPES
        for insert in yaml.safe_load(path.read_text())["inserts"]
    }
    assert set(BLOCK_TYPES) - {"non_local", "self_attention"} <= used
