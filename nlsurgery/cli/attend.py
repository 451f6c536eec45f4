"""``nlsurgery attend``: pictures of where the inserted blocks look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nlsurgery.cli import console
from nlsurgery.cli.options import (
    AllowImportOption,
    InputSizeOption,
    JsonOption,
    NumClassesOption,
    PretrainedOption,
    parse_input_size,
)

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
    allow_import: AllowImportOption = None,
    json: JsonOption = False,
) -> None:
    """Draw where each inserted block attends, from chosen points of an image."""
    sizes = parse_input_size(input_size)
    if point and grid is not None:
        raise typer.BadParameter("give points or a grid, not both", param_hint="'--grid'")
    asked = [parse_point(text) for text in point or ()]

    from nlsurgery.cli.models import is_work_dir, load_operated, read_work_dir, view_of
    from nlsurgery.viz.capture import grid_points
    from nlsurgery.viz.images import read_image

    photos = [read_image(path) for path in images]
    if is_work_dir(target):
        if recipe or checkpoint or pretrained:
            raise typer.BadParameter(
                f"{target} is a work dir, which has its own recipe and checkpoint",
                param_hint="'MODEL_OR_WORKDIR'",
            )
        target, checkpoint, run_sizes = read_work_dir(Path(target))
        sizes = sizes or run_sizes
    model = load_operated(
        target,
        recipe=recipe,
        checkpoint=checkpoint,
        pretrained=pretrained,
        num_classes=num_classes,
        allow_imports=allow_import or (),
    )
    if checkpoint is None and not pretrained:
        console.warn("the weights are random: give --checkpoint or --pretrained")
    views = [view_of(model, photo, sizes) for photo in photos]
    points = [
        [view.relative(x, y) for x, y in asked] or list(grid_points(grid or 2)) for view in views
    ]
    _show(
        [
            _draw(model, *job)
            for job in zip(views, points, images, _prefixes(out, images), strict=True)
        ],
        json,
    )


def _show(results: Sequence[dict[str, Any]], json: bool) -> None:
    if json:
        console.print_json(results)
        return
    for result in results:
        for file in result["pictures"]:
            console.say(file)
    for fqn, reason in results[0]["skipped"].items():
        console.say(f"skipped {fqn}: {reason}")


def _draw(
    model: nn.Module, view: View, points: Sequence[tuple[float, float]], image: Path, prefix: Path
) -> dict[str, Any]:
    from nlsurgery.viz.capture import capture_attention
    from nlsurgery.viz.figure import draw_rows

    captured = capture_attention(model, view.tensor, points)
    written = draw_rows(captured.rows, view.display, points, prefix)
    return {
        "image": str(image),
        "points": [list(point) for point in points],
        "pictures": [str(path) for path in written],
        "skipped": {item.fqn: item.reason for item in captured.skipped},
    }


def _prefixes(out: Path, images: Sequence[Path]) -> list[Path]:
    """What each image's pictures are named by: its stem, numbered where stems clash."""
    stems = [path.stem for path in images]
    return [
        out / (stem if stems.count(stem) == 1 else f"{index}-{stem}")
        for index, stem in enumerate(stems)
    ]


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
