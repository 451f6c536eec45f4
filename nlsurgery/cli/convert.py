"""``nlsurgery convert``: checkpoints of other projects to nlsurgery's names, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nlsurgery.cli import console
from nlsurgery.cli.apply import OverwriteOption, check_target
from nlsurgery.cli.options import (
    InputSizeOption,
    JsonOption,
    parse_input_size,
)
from nlsurgery.errors import CheckpointError
from nlsurgery.tables import count_text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nlsurgery.convert import Choices, Conversion

InArgument = Annotated[
    Path, typer.Argument(metavar="IN", help="The checkpoint: .pth, .pt, .safetensors, caffe2 .pkl.")
]
OutOption = Annotated[
    Path,
    typer.Option("--out", metavar="OUT", help="The file to write: .safetensors, .pth, .pt, .pkl."),
]
FromOption = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="LAYOUT",
        help="alexhex7, mmcv (mmdet, gcnet), mmaction2, slowfast, caffe2, timm, sagan, danet, "
        "ccnet, nlsurgery; auto tells by the keys.",
    ),
]
ToOption = Annotated[
    str, typer.Option("--to", metavar="LAYOUT", help="nlsurgery, or one of the same.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="The backbone; OUT then loads with nlsurgery.load."
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Where the blocks go in MODEL; as the checkpoint has them by default.",
    ),
]
ModeOption = Annotated[
    str | None,
    typer.Option("--mode", help="Pairwise function, which names do not tell (e.g. dot_product)."),
]
ScaleOption = Annotated[
    bool | None,
    typer.Option(
        "--scale/--no-scale", help="Whether softmax logits are divided by the root of C'."
    ),
]
SubSampleOption = Annotated[
    bool | None,
    typer.Option(
        "--sub-sample/--no-sub-sample", help="Whether keys are pooled (SlowFast, caffe2)."
    ),
]
PoolOption = Annotated[
    tuple[int, int, int] | None,
    typer.Option(
        "--pool",
        metavar="T H W",
        help="By how many keys are pooled, if not by 1 2 2 (SlowFast's NONLOCAL.POOL).",
    ),
]
TemporalWindowOption = Annotated[
    int | None,
    typer.Option(
        "--temporal-window",
        min=0,
        help="Frames that attend to each other at res3 of caffe2, 4 where its BatchNorm is frozen; 0: all.",
    ),
]
PoolOrderOption = Annotated[
    str | None,
    typer.Option("--pool-order", help="Of nlsurgery's own blocks: after_conv or before_conv."),
]
RecurrenceOption = Annotated[
    int | None, typer.Option("--recurrence", min=1, help="Passes of criss-cross attention.")
]
BnEpsOption = Annotated[
    float | None,
    typer.Option("--bn-eps", help="Epsilon of the blocks' BatchNorm, if not 1e-5."),
]
NumClassesOption = Annotated[
    int | None,
    typer.Option(
        "--num-classes",
        min=0,
        help="Size of the classifier, if not the checkpoint's own; 0: no classifier (timm).",
    ),
]
PlaceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--place",
        metavar="BLOCK=MODULE",
        help="After which module a block stands (repeatable); from nlsurgery, its name there.",
    ),
]


def convert(
    checkpoint: InArgument,
    out: OutOption,
    source: FromOption = "auto",
    target: ToOption = "nlsurgery",
    model: ModelOption = None,
    recipe: RecipeOption = None,
    mode: ModeOption = None,
    scale: ScaleOption = None,
    sub_sample: SubSampleOption = None,
    pool: PoolOption = None,
    pool_order: PoolOrderOption = None,
    recurrence: RecurrenceOption = None,
    temporal_window: TemporalWindowOption = None,
    bn_eps: BnEpsOption = None,
    place: PlaceOption = None,
    num_classes: NumClassesOption = None,
    overwrite: OverwriteOption = False,
    input_size: InputSizeOption = None,
    json: JsonOption = False,
) -> None:
    """Rename a checkpoint's blocks and backbone; the converted blocks compute the same."""
    sizes = parse_input_size(input_size)
    if recipe is not None and model is None:
        raise typer.BadParameter("needs --model MODEL", param_hint="'--recipe'")
    if pool is not None and sub_sample is not None:
        raise typer.BadParameter("give it or --sub-sample, not both", param_hint="'--pool'")
    check_target(out, checkpoint, overwrite=overwrite)

    from nlsurgery.convert import OURS, Choices, recipe_of
    from nlsurgery.convert.files import read_foreign, write_foreign

    rows: dict[str, Any] | None
    pooled = sub_sample if pool is None else list(pool)
    choices = Choices(mode, scale, pooled, pool_order, recurrence, temporal_window, bn_eps)
    places = dict(_place(text) for text in place or ())
    state = read_foreign(checkpoint)
    if model is not None and target == OURS:
        done, rows = _into_model(
            checkpoint, state, source, choices, places, model, recipe, num_classes, sizes, out
        )
    else:
        done = _renamed(checkpoint, state, source, target, choices, places, model, num_classes)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_foreign(done, out)
        rows = recipe_of(done) if target == OURS else None
    if json:
        console.print_json({"out": str(out), **done.to_dict(), "recipe": rows})
        return
    console.say(str(done))
    console.say(f"saved {out} ({count_text(out.stat().st_size, 'B')})")


def _place(text: str) -> tuple[str, str]:
    block, sign, module = text.partition("=")
    if not sign or not module:
        raise typer.BadParameter(f"must be BLOCK=MODULE, but got {text!r}", param_hint="'--place'")
    return block, module


def _renamed(
    path: Path,
    state: dict[str, Tensor],
    source: str,
    target: str,
    choices: Choices,
    places: dict[str, str],
    model: str | None,
    num_classes: int | None,
) -> Conversion:
    """Convert without a model; from nlsurgery, options come from the model or the file's recipe."""
    from nlsurgery.convert import OURS, convert_state, detect
    from nlsurgery.convert.files import saved_options
    from nlsurgery.convert.fit import model_options

    options: dict[str, dict[str, Any]] = {}
    if (detect(state) if source == "auto" else source) == OURS:
        if model is not None:
            from nlsurgery.checkpoint import load

            options = model_options(load(_build(model, state, num_classes), path))
        else:
            options = saved_options(path)
    elif model is not None:
        raise CheckpointError(
            f"--model goes with --to nlsurgery or --from nlsurgery, not from {source} to {target}"
        )
    return convert_state(state, source, target, choices=choices, places=places, options=options)


def _into_model(
    path: Path,
    state: dict[str, Tensor],
    source: str,
    choices: Choices,
    places: dict[str, str],
    model: str,
    recipe: str | None,
    num_classes: int | None,
    sizes: tuple[int, ...] | None,
    out: Path,
) -> tuple[Conversion, dict[str, Any]]:
    """Convert, operate on the model as the recipe or the checkpoint says, load and save it."""
    import nlsurgery
    from nlsurgery.convert import convert_state, recipe_of
    from nlsurgery.convert.fit import load_converted, model_options

    plain = convert_state(state, source, choices=choices, places=places)
    network = _build(model, plain.tensors, num_classes)
    rows = recipe_of(plain)
    if recipe is not None:
        nlsurgery.apply(network, recipe, input_size=sizes)
        hints = model_options(network)
        plain = convert_state(state, source, choices=choices, places=places, options=hints)
        rows = nlsurgery.load_recipe(recipe).to_mapping()
    elif rows is None:
        lost = next(spec.name for spec in plain.blocks if spec.host is None)
        raise CheckpointError(
            f"{path}: nothing tells after which module of {model} its block {lost!r} stands; say so "
            f"with --place {lost}=MODULE"
        )
    else:
        nlsurgery.apply(network, rows, input_size=sizes)
    done = load_converted(network, plain, str(path))
    out.parent.mkdir(parents=True, exist_ok=True)
    nlsurgery.save(network, out)
    assert rows is not None
    return done, rows


def _build(model: str, tensors: dict[str, Tensor], num_classes: int | None) -> nn.Module:
    """The model, with the checkpoint's classifier size if none is given."""
    from nlsurgery.cli.models import classifier_size
    from nlsurgery.integrations.hub import create_model

    network = create_model(model, num_classes=num_classes)
    own = network.state_dict()
    flat = {k: v for k, v in tensors.items() if k in own and v.dim() == own[k].dim()}
    found = classifier_size(network, flat)
    if num_classes is not None or found is None:
        return network
    return create_model(model, num_classes=found)
