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
    table = console.new_table("Packaged recipes", ("recipe", "what", "where", "source"))
    for name, recipe in found.items():
        table.add_row(name, *_describe(recipe))
    console.print_table(table)


def _describe(recipe: Recipe) -> tuple[str, str, str]:
    """What, where and source of one recipe; a line per entry, blocks that are the same once."""
    inserts = recipe.to_mapping()["inserts"]
    blocks = [_block(insert["block"]) for insert in inserts]
    if len(set(blocks)) == 1:
        del blocks[1:]
    source = [text for text in (recipe.source, recipe.published) if text]
    return "\n".join(blocks), "\n".join(_place(insert) for insert in inserts), "\n".join(source)


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
