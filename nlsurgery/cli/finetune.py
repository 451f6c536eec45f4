"""``nlsurgery finetune``: operate on a checkpoint, prove the identity, train, score."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nlsurgery.cli import console

if TYPE_CHECKING:
    from nlsurgery.finetune import FinetuneResult


class Task(str, Enum):
    """What is learnt."""

    classify = "classify"
    detect = "detect"


class Amp(str, Enum):
    """Mixed precision."""

    off = "off"
    bf16 = "bf16"
    fp16 = "fp16"


class Optimizer(str, Enum):
    """Optimisers."""

    sgd = "sgd"
    adamw = "adamw"


class Schedule(str, Enum):
    """How the learning rate falls."""

    cosine = "cosine"
    step = "step"
    constant = "constant"


class Augment(str, Enum):
    """How much the training images are changed."""

    default = "default"
    light = "light"
    none = "none"


DATA, TRAIN, RUN = "Model and data", "Training", "The run"


def _option(group: str, name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=group, **more)


def finetune(
    model: Annotated[
        str | None, _option(DATA, "--model", "timm/NAME, torchvision/NAME or a bare name.")
    ] = None,
    checkpoint: Annotated[
        str | None, _option(DATA, "--checkpoint", "Weights of the original model.")
    ] = None,
    pretrained: Annotated[
        bool | None, _option(DATA, "--pretrained", "Download the library's own weights.")
    ] = None,
    recipe: Annotated[str | None, _option(DATA, "--recipe", "A recipe's name or file.")] = None,
    allow_import: Annotated[
        list[str] | None,
        _option(DATA, "--allow-import", "Let the recipe import blocks of this package."),
    ] = None,
    data: Annotated[
        str | None,
        _option(
            DATA,
            "--data",
            "A folder of classes of images or videos (or train/ and val/), a timm "
            "dataset such as torch/cifar10, or a COCO folder to detect in.",
        ),
    ] = None,
    task: Annotated[Task | None, _option(DATA, "--task", "What is learnt. [classify]")] = None,
    data_root: Annotated[
        str | None, _option(DATA, "--data-root", "Root folder of a timm dataset.")
    ] = None,
    data_download: Annotated[
        bool | None, _option(DATA, "--data-download", "Let a timm dataset download itself.")
    ] = None,
    image_size: Annotated[
        int | None, _option(DATA, "--image-size", "Pixels; the model's own by default.", min=8)
    ] = None,
    clip_frames: Annotated[
        int | None, _option(DATA, "--clip-frames", "Frames a clip of a video.", min=1)
    ] = None,
    augment: Annotated[
        Augment | None,
        _option(DATA, "--augment", "timm's augmentation, crops alone, or none. [default]"),
    ] = None,
    epochs: Annotated[
        int | None, _option(TRAIN, "--epochs", "Passes over the data.", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, _option(TRAIN, "--batch-size", "Samples a step, of all processes.", min=1)
    ] = None,
    accumulate: Annotated[
        int | None, _option(TRAIN, "--accumulate", "Steps to add gradients up over.", min=1)
    ] = None,
    lr: Annotated[float | None, _option(TRAIN, "--lr", "Peak learning rate.")] = None,
    inserted_lr_mult: Annotated[
        float | None, _option(TRAIN, "--inserted-lr-mult", "Factor on --lr for inserted blocks.")
    ] = None,
    weight_decay: Annotated[
        float | None, _option(TRAIN, "--weight-decay", "Not of γ, norms and biases.", min=0)
    ] = None,
    optimizer: Annotated[Optimizer | None, _option(TRAIN, "--optimizer", "[sgd]")] = None,
    schedule: Annotated[
        Schedule | None, _option(TRAIN, "--schedule", "How the rate falls. [cosine]")
    ] = None,
    lr_steps: Annotated[
        str | None,
        _option(
            TRAIN, "--lr-steps", "Epochs after which `step` divides the rate by 10, e.g. 8,11."
        ),
    ] = None,
    warmup: Annotated[
        float | None, _option(TRAIN, "--warmup", "Share of all steps in which the rate rises.")
    ] = None,
    clip_grad: Annotated[
        float | None, _option(TRAIN, "--clip-grad", "Largest norm of all gradients together.")
    ] = None,
    ema: Annotated[
        float | None, _option(TRAIN, "--ema", "Average the weights with this decay, e.g. 0.999.")
    ] = None,
    early_stop: Annotated[
        int | None, _option(TRAIN, "--early-stop", "Epochs without a better score.", min=1)
    ] = None,
    freeze_backbone: Annotated[
        bool | None, _option(TRAIN, "--freeze-backbone", "Train blocks and head alone.")
    ] = None,
    amp: Annotated[Amp | None, _option(TRAIN, "--amp", "Mixed precision. [off]")] = None,
    seed: Annotated[int | None, _option(TRAIN, "--seed", "[0]", min=0)] = None,
    device: Annotated[str | None, _option(RUN, "--device", "cuda, cuda:1 or cpu.")] = None,
    num_workers: Annotated[
        int | None, _option(RUN, "--num-workers", "Loader processes.", min=0)
    ] = None,
    work_dir: Annotated[Path | None, _option(RUN, "--work-dir", "Where results go.")] = None,
    shard: Annotated[
        bool | None, _option(RUN, "--shard", "Deal the model out to torchrun's processes (FSDP).")
    ] = None,
    save_every: Annotated[
        int | None, _option(RUN, "--save-every", "Steps between saves inside an epoch.", min=1)
    ] = None,
    resume: Annotated[
        bool, _option(RUN, "--resume", "Go on from the work dir's last saved state.")
    ] = False,
    tensorboard: Annotated[
        bool | None, _option(RUN, "--tensorboard", "Write TensorBoard files as well.")
    ] = None,
    dry_run: Annotated[
        bool, _option(RUN, "--dry-run", "Print the plan, the memory and the time; write nothing.")
    ] = False,
) -> None:
    """Operate on a pretrained model, prove that nothing changed, fine-tune it.

    Without arguments: EfficientNet-Lite0 pretrained on ImageNet, on 5,000 MNIST digits.
    """
    given: dict[str, Any] = {
        "task": task, "model": model, "checkpoint": checkpoint, "pretrained": pretrained,
        "recipe": recipe, "allow_imports": allow_import or None, "data": data,
        "data_root": data_root, "data_download": data_download,
        "image_size": image_size, "clip_frames": clip_frames, "augment": augment, "epochs": epochs,
        "batch_size": batch_size, "accumulate": accumulate, "lr": lr,
        "inserted_lr_mult": inserted_lr_mult, "weight_decay": weight_decay, "optimizer": optimizer,
        "schedule": schedule, "lr_steps": parse_epochs(lr_steps), "warmup": warmup,
        "clip_grad": clip_grad, "ema": ema, "early_stop": early_stop,
        "freeze_backbone": freeze_backbone, "amp": amp, "seed": seed, "device": device,
        "num_workers": num_workers, "work_dir": work_dir, "save_every": save_every, "shard": shard,
        "resume": resume, "tensorboard": tensorboard,
    }  # fmt: skip
    values = {
        key: value.value if isinstance(value, Enum) else str(value) if key == "work_dir" else value
        for key, value in given.items()
        if value is not None
    }

    from nlsurgery.finetune import FinetuneConfig, estimate, run
    from nlsurgery.finetune.distributed import is_first_process, leave

    config = FinetuneConfig.make(**complete(values))
    if dry_run:
        text = str(estimate(config, say=console.say))
    else:
        with console.progress_bar() as progress:
            text = summary(run(config, say=progress.say, progress=progress.update))
    if is_first_process():
        console.say(text)
    if config.shard:
        leave()


def parse_epochs(text: str | None) -> tuple[int, ...] | None:
    """Read ``--lr-steps``: ``8,11``.

    Raises:
        typer.BadParameter: Not rising positive whole numbers.
    """
    if text is None:
        return None
    parts = text.split(",")
    epochs = [int(part) for part in parts if part.strip().isdecimal()]
    if len(epochs) != len(parts) or epochs != sorted(set(epochs)) or epochs[0] < 1:
        raise typer.BadParameter(
            f"must be rising epochs such as 8,11, but got {text!r}", param_hint="'--lr-steps'"
        )
    return tuple(epochs)


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """Fill what was not given: from the work dir to resume in, or with the demo's choices.

    Raises:
        typer.BadParameter: A model without its recipe or data, or a checkpoint of nothing.
    """
    from nlsurgery.finetune.config import FinetuneConfig, demo_values
    from nlsurgery.finetune.distributed import num_processes

    if given.get("resume") and "model" not in given:
        folder = latest_run(given.get("work_dir"))
        if folder is not None:
            started = FinetuneConfig.read(folder).model_dump()
            started["shard"] = started["shard"] and num_processes() > 1
            return {**started, "work_dir": str(folder), **given}
    if "model" in given:
        missing = [f"--{key}" for key in ("recipe", "data") if key not in given]
        if missing:
            raise typer.BadParameter(f"--model needs {' and '.join(missing)} as well")
        return given
    for key in ("checkpoint", "pretrained", "task"):
        if key in given:
            raise typer.BadParameter(f"--{key} needs --model as well")
    demo = demo_values()
    if "data" in given:
        demo = {k: v for k, v in demo.items() if k not in ("work_dir", "image_size", "augment")}
    return {**demo, **given}


def latest_run(work_dir: str | None) -> Path | None:
    """The work dir to resume in: the one given, or the default one that was started last."""
    from nlsurgery.finetune.config import CONFIG_FILE, DEFAULT_WORK_DIR, DEMO_WORK_DIR

    choices = (DEFAULT_WORK_DIR, DEMO_WORK_DIR) if work_dir is None else (work_dir,)
    started = [Path(name) for name in choices if (Path(name) / CONFIG_FILE).is_file()]
    return max(started, key=lambda path: (path / CONFIG_FILE).stat().st_mtime, default=None)


def summary(result: FinetuneResult) -> str:
    """The lines after a run: what it gained, and where everything lies."""
    before, after = result.before[result.score], result.after[result.score]
    listing = (p.name + ("/" if p.is_dir() else "") for p in result.work_dir.iterdir())
    lines = [
        f"\nvalidation {result.score} {before:.2f} -> {after:.2f} ({after - before:+.2f})",
        f"work dir {result.work_dir}: "
        + ", ".join(sorted(name for name in listing if not name.startswith("."))),
    ]
    if result.stopped_at is not None:
        lines.append(
            f"stopped after step {result.stopped_at} on request; everything is saved: the same "
            f"command with --resume goes on"
        )
    return "\n".join(lines)
