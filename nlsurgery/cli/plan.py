"""``nlsurgery plan``: what a recipe would insert into a model, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nlsurgery.cli import console
from nlsurgery.cli.options import (
    AllowImportOption,
    InputSizeOption,
    JsonOption,
    ModelArgument,
    RecipeArgument,
    parse_input_size,
)
from nlsurgery.tables import count_text, size_text

if TYPE_CHECKING:
    from nlsurgery.planning import Plan


def plan(
    model: ModelArgument,
    recipe: RecipeArgument,
    input_size: InputSizeOption = None,
    allow_import: AllowImportOption = None,
    json: JsonOption = False,
) -> None:
    """Show where a recipe's blocks would go and their parameters, FLOPs and activation memory."""
    sizes = parse_input_size(input_size)

    import nlsurgery
    from nlsurgery.integrations.hub import create_model

    planned = nlsurgery.plan(
        create_model(model), recipe, input_size=sizes, allow_imports=allow_import or ()
    )
    if json:
        console.print_json(planned.to_dict())
    else:
        _print_insertions(f"{recipe} on {model}", planned)


def _print_insertions(title: str, planned: Plan) -> None:
    numbers = ("channels", "N", "parameters", "FLOPs", "activations")
    table = console.new_table(
        title, ("where", "stage", "at", "block", "size", *numbers), right=numbers
    )
    for row in planned.insertions:
        table.add_row(
            row.fqn,
            row.stage,
            row.at,
            row.type,
            size_text(row.feature_size),
            str(row.num_chs),
            f"{row.num_positions:,}",
            f"{row.num_params:,}",
            count_text(row.flops),
            count_text(row.activation_bytes, "B"),
        )
    table.add_section()
    table.add_row(
        f"total ({len(planned.insertions)})",
        *[""] * 6,
        f"{planned.num_params:,}",
        count_text(planned.flops),
        count_text(planned.activation_bytes, "B"),
        style="bold",
    )
    console.print_table(table)
    console.say(
        f"per sample of {size_text(planned.input_size)} in float32; FLOPs: one forward, a "
        "multiply-add counts two; activations: what a training forward keeps for backward"
    )
