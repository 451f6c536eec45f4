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

    rows = [_describe(name, load_recipe(name)) for name in list_recipes()]
    if json:
        console.print_json(rows)
        return
    table = console.new_table("Packaged recipes", ("recipe", "what", "where", "source"))
    for row in rows:
        table.add_row(row["name"], "\n".join(row["what"]), "\n".join(row["where"]), row["source"])
    console.print_table(table)


def _describe(name: str, recipe: Recipe) -> dict[str, Any]:
    return {
        "name": name,
        "what": [_options(insert.block) for insert in recipe.inserts],
        "where": [
            f"{insert.stage} after {insert.after}"
            + ("" if insert.at == "output" else f", at {insert.at}")
            for insert in recipe.inserts
        ],
        "source": recipe.source or "",
    }


def _options(block: Any) -> str:
    given = block if isinstance(block, dict) else block.model_dump(exclude_unset=True)
    options = ", ".join(f"{key}={value}" for key, value in given.items() if key != "type")
    kind = given.get("type", getattr(block, "type", ""))
    return f"{kind}({options})" if options else str(kind)
