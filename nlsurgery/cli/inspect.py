"""``nlsurgery inspect``: the stages of a model, where blocks can go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nlsurgery.cli import console
from nlsurgery.cli.options import InputSizeOption, JsonOption, ModelArgument, parse_input_size
from nlsurgery.tables import size_text

if TYPE_CHECKING:
    from nlsurgery.stages import Anatomy


def inspect(
    model: ModelArgument, input_size: InputSizeOption = None, json: JsonOption = False
) -> None:
    """Show a model's stages and blocks, under every name a recipe may use."""
    sizes = parse_input_size(input_size)

    import nlsurgery
    from nlsurgery.integrations.hub import create_model

    anatomy = nlsurgery.inspect(create_model(model), input_size=sizes)
    if json:
        console.print_json(anatomy.to_dict())
    else:
        _print_stages(model, anatomy)


def _print_stages(model: str, anatomy: Anatomy) -> None:
    columns = ("stage", "also", "module", "channels", "reduction", "layout", "size", "blocks")
    table = console.new_table(f"Stages of {model}", columns, right=("channels", "reduction"))
    for stage in anatomy.stages:
        table.add_row(
            stage.name,
            ", ".join(stage.aliases),
            stage.fqn,
            str(stage.num_chs),
            str(stage.reduction),
            stage.layout,
            size_text(stage.feature_size),
            _span(stage.blocks),
        )
    console.print_table(table)


def _span(blocks: tuple[str, ...]) -> str:
    if len(blocks) < 3:
        return ", ".join(blocks)
    return f"{blocks[0]} … {blocks[-1]} ({len(blocks)})"
