"""``nlsurgery attend``: pictures of where the inserted blocks look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nlsurgery.cli import console
from nlsurgery.cli.options import (
    InputSizeOption,
    JsonOption,
    NumClassesOption,
    PretrainedOption,
    parse_input_size,
)
from nlsurgery.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from nlsurgery.viz.images import View

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_WORKDIR",
        help="A model's name, or the work dir of nlsurgery finetune, which needs no more options.",
    ),
]
ImagesArgument = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="The recipe; not needed where the checkpoint carries it."),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Weights: of the operated model, or of the plain one with --recipe."
    ),
]
PointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--point",
        metavar="X,Y",
        help="A query point, repeatable: in pixels of the image, or relative (0 to 1) to what the "
        "model sees of it.",
    ),
]
GridOption = Annotated[
    int | None, typer.Option("--grid", min=1, max=5, help="Query points on a grid, N by N [2].")
]
OutOption = Annotated[Path, typer.Option("--out", help="The folder for the pictures.")]


def attend(
    target: TargetArgument,
    images: ImagesArgument,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    num_classes: NumClassesOption = None,
    point: PointOption = None,
    grid: GridOption = None,
    out: OutOption = Path("attention"),
    input_size: InputSizeOption = None,
    json: JsonOption = False,
) -> None:
    """Draw where each inserted block attends, from chosen points of an image."""
    sizes = parse_input_size(input_size)
    if point and grid is not None:
        raise typer.BadParameter("give points or a grid, not both", param_hint="'--grid'")
    asked = [parse_point(text) for text in point or ()]

    from nlsurgery.viz.loading import load_operated, view_of
    from nlsurgery.viz.images import read_image

    photos = [read_image(path) for path in images]
    model = load_operated(
        target, recipe=recipe, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes
    )
    views = [view_of(model, photo, sizes) for photo in photos]
    results = [
        _draw(model, path, view, asked, grid or 2, out)
        for path, view in zip(images, views, strict=True)
    ]
    if json:
        console.print_json(results)


def parse_point(text: str) -> tuple[float, float]:
    """Read ``x,y``.

    Raises:
        typer.BadParameter: Not two numbers of at least 0.
    """
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x < float("inf") and 0 <= y < float("inf")):
        raise typer.BadParameter(
            f"must be x,y, two numbers from 0, but got {text!r}", param_hint="'--point'"
        )
    return x, y
