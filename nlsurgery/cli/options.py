"""The arguments and options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="timm/NAME, torchvision/NAME, or a bare name (timm is asked first)."
    ),
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="The name of a packaged recipe, or a YAML file.")
]
AllowImportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-import",
        metavar="PACKAGE",
        help="Let the recipe import blocks of this package, which runs its code; may be repeated.",
    ),
]
InputSizeOption = Annotated[
    str | None,
    typer.Option(
        "--input-size",
        metavar="[C] [T] H W",
        help="Size of the input to measure with, e.g. 3 224 224; the model's own by default.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
NumClassesOption = Annotated[
    int | None,
    typer.Option(
        "--num-classes",
        min=1,
        help="Size of the classifier; the checkpoint's, or the model's own, by default.",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="IN", help="Weights to load (safetensors or torch file)."),
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Download the library's own weights.")
]


def parse_input_size(value: str | None) -> tuple[int, ...] | None:
    """Read ``--input-size``: ``3x224x224``, ``3,224,224``, ``224x224``; video adds T after C.

    Raises:
        typer.BadParameter: Not two to four positive numbers.
    """
    if value is None:
        return None
    parts = value.lower().replace(",", "x").split("x")
    if not (2 <= len(parts) <= 4 and all(part.isdecimal() and int(part) > 0 for part in parts)):
        raise typer.BadParameter(
            f"must be H W, C H W or C T H W (positive numbers), but got {value!r}",
            param_hint="'--input-size'",
        )
    return tuple(int(part) for part in parts)
