"""``nlsurgery recipes``: what the package brings along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nlsurgery.cli import console
from nlsurgery.cli.options import JsonOption

if TYPE_CHECKING:
    from nlsurgery.recipe import Recipe


def recipes(json: JsonOption = False) -> None:
    """List the packaged recipes: what each inserts, where, and the paper it follows."""
    from nlsurgery.recipe import list_recipes, load_recipe

    found = {name: load_recipe(name) for name in list_recipes()}
    if json:
        console.print_json([{"name": name, **item.to_mapping()} for name, item in found.items()])
        return
    for name, recipe in found.items():
        console.print_record(name, _describe(recipe))


def _describe(recipe: Recipe) -> dict[str, list[str]]:
    """What, where and source of one recipe; entries that insert the same block share a line."""
    places: dict[str, list[str]] = {}
    for insert in recipe.to_mapping()["inserts"]:
        places.setdefault(_block(insert["block"]), []).append(_place(insert))
    return {
        "what": list(places),
        "where": ["; ".join(place) for place in places.values()],
        "source": [recipe.source] if recipe.source else [],
        "result": [recipe.published] if recipe.published else [],
    }


def _block(block: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in block.items() if key != "type")
    return f"{block['type']}({options})" if options else str(block["type"])


def _place(insert: dict[str, Any]) -> str:
    after = insert["after"]
    if isinstance(after, list):
        after = ", ".join(str(index) for index in after)
    elif isinstance(after, dict):
        after = ", ".join(f"{key} {value}" for key, value in after.items())
    at = "" if insert["at"] == "output" else f", at {insert['at']}"
    return f"{insert['stage']} after {after}{at}"
