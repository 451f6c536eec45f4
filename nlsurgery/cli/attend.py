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
ImagesArgument = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE...", help="Image files; videos for a model that takes clips."),
]
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
        metavar="X,Y[,T]",
        help="A query point, repeatable: in pixels of the image, or relative (0 to 1) to what the "
        "model sees of it; in a clip also when, from 0 to 1 [0.5].",
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
    """Draw where each inserted block attends, from chosen points of an image or a clip."""
    sizes = parse_input_size(input_size)
    if point and grid is not None:
        raise typer.BadParameter("give points or a grid, not both", param_hint="'--grid'")
    asked = [parse_point(text) for text in point or ()]

    from nlsurgery.cli.models import (
        check_readable,
        is_work_dir,
        load_operated,
        read_work_dir,
        views_of,
    )
    from nlsurgery.finetune.config import FinetuneConfig
    from nlsurgery.viz.capture import grid_points

    check_readable(images)
    if is_work_dir(target):
        if recipe or checkpoint or pretrained:
            raise typer.BadParameter(
                f"{target} is a work dir, which has its own recipe and checkpoint",
                param_hint="'MODEL_OR_WORKDIR'",
            )
        config, checkpoint = read_work_dir(Path(target))
    else:
        config = FinetuneConfig.make(model=target, recipe=recipe or "", data="")
    model = load_operated(
        config.model,
        recipe=recipe,
        checkpoint=checkpoint,
        pretrained=pretrained,
        num_classes=num_classes,
        allow_imports=allow_import or (),
    )
    if checkpoint is None and not pretrained:
        console.warn("the weights are random: give --checkpoint or --pretrained")
    views = views_of(model, images, config, sizes)
    points = [
        [(*view.relative(x, y), *time) for x, y, *time in asked] or list(grid_points(grid or 2))
        for view in views
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
    model: nn.Module, view: View, points: Sequence[tuple[float, ...]], image: Path, prefix: Path
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


def parse_point(text: str) -> tuple[float, ...]:
    """Read ``x,y`` or ``x,y,t``.

    Raises:
        typer.BadParameter: Not two numbers of at least 0, and perhaps one from 0 to 1.
    """
    try:
        x, y, *time = (float(part) for part in text.split(","))
    except ValueError:
        x, y, time = -1.0, -1.0, []
    right = 0 <= x < float("inf") and 0 <= y < float("inf") and len(time) < 2
    if not (right and all(0 <= t <= 1 for t in time)):
        raise typer.BadParameter(
            f"must be x,y, two numbers from 0, or x,y,t with t from 0 to 1, but got {text!r}",
            param_hint="'--point'",
        )
    return x, y, *time
