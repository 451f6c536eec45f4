"""``nlsurgery finetune``: operate on a checkpoint, prove the identity, train, score."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from nlsurgery.cli import console


class Amp(str, Enum):
    """Mixed precision."""

    off = "off"
    bf16 = "bf16"
    fp16 = "fp16"


class Optimizer(str, Enum):
    """Optimisers."""

    sgd = "sgd"
    adamw = "adamw"


class Augment(str, Enum):
    """How much the training images are changed."""

    default = "default"
    light = "light"
    none = "none"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="timm/NAME, torchvision/NAME or a bare name; the demo without."),
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="Weights of the original model.")
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe's name or file.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="A folder of classes (or train/ and val/), or a timm dataset name."
    ),
]
DataRootOption = Annotated[
    str | None, typer.Option("--data-root", help="Root folder of a timm dataset.")
]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1)]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=1)]
LrOption = Annotated[float | None, typer.Option("--lr", help="Peak rate; cosine to zero.")]
MultOption = Annotated[
    float | None, typer.Option("--inserted-lr-mult", help="Factor on --lr for inserted blocks.")
]
DecayOption = Annotated[float | None, typer.Option("--weight-decay", min=0)]
FreezeOption = Annotated[
    bool | None, typer.Option("--freeze-backbone", help="Train blocks and classifier alone.")
]
SizeOption = Annotated[
    int | None, typer.Option("--image-size", min=8, help="Pixels; the model's own by default.")
]
WorkersOption = Annotated[int | None, typer.Option("--num-workers", min=0)]
SeedOption = Annotated[int | None, typer.Option("--seed")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cuda or cpu.")]
WorkDirOption = Annotated[Path | None, typer.Option("--work-dir", help="Where results go.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the work dir's last checkpoint.")
]


def finetune(
    model: ModelOption = None,
    checkpoint: CheckpointOption = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    data_root: DataRootOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    lr: LrOption = None,
    inserted_lr_mult: MultOption = None,
    weight_decay: DecayOption = None,
    optimizer: Annotated[Optimizer | None, typer.Option("--optimizer")] = None,
    freeze_backbone: FreezeOption = None,
    amp: Annotated[Amp | None, typer.Option("--amp")] = None,
    augment: Annotated[Augment | None, typer.Option("--augment")] = None,
    image_size: SizeOption = None,
    num_workers: WorkersOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    work_dir: WorkDirOption = None,
    resume: ResumeOption = False,
) -> None:
    """Operate on a pretrained classifier, prove that nothing changed, fine-tune it.

    Without arguments: EfficientNet-Lite0 pretrained on ImageNet, on 5,000 MNIST digits.
    """
    given: dict[str, Any] = {
        "model": model, "checkpoint": checkpoint, "recipe": recipe, "data": data,
        "data_root": data_root, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "inserted_lr_mult": inserted_lr_mult, "weight_decay": weight_decay,
        "optimizer": optimizer.value if optimizer else None, "freeze_backbone": freeze_backbone,
        "amp": amp.value if amp else None, "augment": augment.value if augment else None,
        "image_size": image_size, "num_workers": num_workers, "seed": seed, "device": device,
        "work_dir": str(work_dir) if work_dir else None, "resume": resume,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}

    from nlsurgery.finetune import FinetuneConfig, run
    from nlsurgery.finetune.config import demo_values

    if model is None and data is None:
        if checkpoint is not None:
            raise typer.BadParameter("needs --model and --data", param_hint="'--checkpoint'")
        given = {**demo_values(), **given}
    missing = [f"--{key}" for key in ("model", "recipe", "data") if key not in given]
    if missing:
        raise typer.BadParameter(f"give {' and '.join(missing)} as well (or nothing at all)")
    with console.progress_bar() as progress:
        result = run(FinetuneConfig.make(**given), say=progress.say, progress=progress.update)
    gain = result.after["accuracy"] - result.before["accuracy"]
    console.say(
        f"\nvalidation accuracy {result.before['accuracy']:.2f}% -> {result.after['accuracy']:.2f}% "
        f"({gain:+.2f})\nwork dir {result.work_dir}: {', '.join(sorted(_listing(result.work_dir)))}"
    )


def _listing(folder: Path) -> list[str]:
    names = (p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return [name for name in names if not name.startswith(".")]
