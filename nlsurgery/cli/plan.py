"""``nlsurgery plan``: what a recipe would insert into a model, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nlsurgery.cli import console
from nlsurgery.cli.options import (
    InputSizeOption,
    JsonOption,
    ModelArgument,
    RecipeArgument,
    parse_input_size,
)

if TYPE_CHECKING:
    from nlsurgery.planning import Plan


def plan(
    model: ModelArgument,
    recipe: RecipeArgument,
    input_size: InputSizeOption = None,
    json: JsonOption = False,
) -> None:
    """Show where a recipe's blocks would go and their parameters, FLOPs and activation memory."""
    sizes = parse_input_size(input_size)

    import nlsurgery
    from nlsurgery.integrations.hub import create_model

    planned = nlsurgery.plan(create_model(model), recipe, input_size=sizes)
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
            console.shape(row.feature_size),
            str(row.num_chs),
            console.count(row.num_positions),
            console.count(row.num_params),
            console.flops(row.flops),
            console.size(row.activation_bytes),
        )
    table.add_section()
    table.add_row(
        f"total ({len(planned.insertions)})",
        *[""] * 6,
        console.count(planned.num_params),
        console.flops(planned.flops),
        console.size(planned.activation_bytes),
        style="bold",
    )
    console.print_table(table)
    console.say("FLOPs: one image, forward. Activations: what a training step keeps for one image.")
