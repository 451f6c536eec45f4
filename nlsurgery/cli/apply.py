"""``nlsurgery apply``: a checkpoint in, the operated checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nlsurgery.cli import console
from nlsurgery.cli.options import (
    AllowImportOption,
    CheckpointOption,
    InputSizeOption,
    JsonOption,
    ModelArgument,
    NumClassesOption,
    PretrainedOption,
    RecipeArgument,
    parse_input_size,
)
from nlsurgery.errors import CheckpointError
from nlsurgery.tables import count_text

OutOption = Annotated[
    Path, typer.Option("--out", metavar="OUT", help="The safetensors file to write.")
]
InsertedOnlyOption = Annotated[
    bool, typer.Option("--inserted-only", help="Keep the inserted blocks' values alone.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists (IN is never replaced).")
]


def apply(
    model: ModelArgument,
    recipe: RecipeArgument,
    out: OutOption,
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    num_classes: NumClassesOption = None,
    inserted_only: InsertedOnlyOption = False,
    overwrite: OverwriteOption = False,
    input_size: InputSizeOption = None,
    allow_import: AllowImportOption = None,
    json: JsonOption = False,
) -> None:
    """Insert a recipe's blocks into a checkpoint; the operated model computes the same at first."""
    sizes = parse_input_size(input_size)
    if (checkpoint is None) != pretrained:
        raise typer.BadParameter(
            "give the weights to operate on, as either --checkpoint IN or --pretrained",
            param_hint="'--checkpoint'",
        )
    check_target(out, checkpoint, overwrite=overwrite)

    import nlsurgery
    from nlsurgery.cli.models import load_plain

    network = load_plain(model, checkpoint, pretrained=pretrained, num_classes=num_classes)
    nlsurgery.apply(network, recipe, input_size=sizes, allow_imports=allow_import or ())
    out.parent.mkdir(parents=True, exist_ok=True)
    nlsurgery.save(network, out, inserted_only=inserted_only)
    report = nlsurgery.report(network)
    if json:
        console.print_json({"out": str(out), **report.to_dict()})
        return
    console.say(str(report))
    size = count_text(out.stat().st_size, "B")
    console.say(f"saved {out} ({size})")


def check_target(out: Path, checkpoint: Path | None, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a place that the result cannot be written to.

    Raises:
        CheckpointError: ``out`` is the input, exists without ``overwrite``, or is a folder.
    """
    if out.is_dir():
        raise CheckpointError(
            f"--out {out} is a folder; name a file in it, such as {out}/model.safetensors"
        )
    if checkpoint is not None and out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise CheckpointError(
            f"--out {out} is the input checkpoint, which is kept; name another file"
        )
    if out.exists() and not overwrite:
        raise CheckpointError(
            f"--out {out} exists; add --overwrite to replace it, or name another file"
        )
