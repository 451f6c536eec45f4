"""One fine-tuning run, from the original checkpoint to the scores after."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import DefaultSampler, default_collate, worker_init_fn
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nlsurgery.checkpoint import load_tensors, read_state_dict
from nlsurgery.errors import DataError, SurgeryError, VerifyError
from nlsurgery.finetune.checkpoints import MODEL_FILE, StateHook, read_state
from nlsurgery.finetune.config import DEMO, FinetuneConfig
from nlsurgery.finetune.data import Data, Images, make_transforms, read_data
from nlsurgery.finetune.history import History
from nlsurgery.finetune.hooks import EpochSeedHook, HistoryHook, ProgressHook, seed_everything
from nlsurgery.finetune.model import Accuracy, AutocastWrapper, Classifier
from nlsurgery.integrations.demo import demo_model
from nlsurgery.integrations.hub import create_model
from nlsurgery.parameters import inserted_parameters, param_groups
from nlsurgery.planning import Plan
from nlsurgery.surgery import apply, disabled, plan

Say = Callable[[str], None]
Progress = Callable[[int, int, float, float], None]
_CLASSIFIERS = ("classifier", "fc", "head", "heads", "last_linear")


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What a run came to.

    Attributes:
        work_dir: Where everything lies.
        model_file: The operated model, for ``nlsurgery.load``.
        before: Accuracy in percent and loss on the validation set before the first step.
        after: The same after the last.
        max_difference: Largest difference between the logits of the original and the operated model.
        pictures: Attention pictures.
    """

    work_dir: Path
    model_file: Path
    before: dict[str, float]
    after: dict[str, float]
    max_difference: float
    pictures: tuple[Path, ...]


def run(
    config: FinetuneConfig, *, say: Say = print, progress: Progress | None = None
) -> FinetuneResult:
    """Operate, prove identity, score, train, score again.

    Args:
        config: The run.
        say: Called with every message for the user.
        progress: Called with (step, steps, loss, accuracy in percent) after every step.

    Raises:
        SurgeryError: Bad model, checkpoint, recipe or data; nothing has been written then.
    """
    device = choose_device(config)
    data = read_data(config)
    seed_everything(config.seed)
    backbone = build_backbone(config, data.num_classes)
    train_transform, val_transform = make_transforms(config, backbone)
    size = _input_size(val_transform, data)
    made = plan(backbone, config.recipe, input_size=size)
    folder = _make_folder(config)
    state = read_state(folder, _fingerprint(config, made)) if config.resume else None
    say(str(made))
    loaders = _loaders(config, data, train_transform, val_transform)
    difference = operate(backbone, config, size, next(iter(loaders[1]))[0], device)
    say(f"identity on the first batch: max |Δ| = {difference:g}")
    config.write(folder)
    history = History()
    if state is not None:
        history.fill(state["history"])
        say(f"resuming after epoch {state['epoch']} of {config.epochs}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mmengine")
        runner = _runner(
            config, folder, backbone, loaders, device, history, state, progress, made, say
        )
        runner.train()
    history.write(folder)
    pictures = draw_attention(backbone, folder, data, val_transform, device)
    before, after = history.scores[0], history.scores[-1]
    return FinetuneResult(folder, folder / MODEL_FILE, before, after, difference, pictures)


def choose_device(config: FinetuneConfig) -> torch.device:
    """The device of a run: the one asked for, else CUDA where there is one.

    Raises:
        SurgeryError: It is not there, or cannot compute in the precision asked for.
    """
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SurgeryError(f"--device {name}: not available here ({error})") from error
    if config.amp == "fp16" and device.type != "cuda":
        raise SurgeryError(f"--amp fp16 needs a CUDA device, but got {device.type}; use --amp bf16")
    return device


def build_backbone(config: FinetuneConfig, num_classes: int) -> nn.Module:
    """Build the original model with its checkpoint and a classifier for the data's classes.

    A classifier of another size in the checkpoint is left out; every other key must fit.

    Raises:
        ModelError: Unknown model.
        CheckpointError: Unreadable, or of another model.
    """
    if config.checkpoint == DEMO:
        return demo_model(num_classes)
    model = create_model(config.model, num_classes=num_classes)
    if config.checkpoint is not None:
        tensors = read_state_dict(config.checkpoint)
        own = model.state_dict()
        heads = {
            key
            for key in own
            if key.partition(".")[0] in _CLASSIFIERS
            and key in tensors
            and tensors[key].shape != own[key].shape
        }
        parts = {key.rpartition(".")[0] for key in heads}
        kept = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in parts}
        wanted = {key for key in own if key.rpartition(".")[0] not in parts}
        load_tensors(model, kept, config.checkpoint, wanted)
    return model


def operate(
    model: nn.Module,
    config: FinetuneConfig,
    size: tuple[int, ...],
    images: Tensor,
    device: torch.device,
) -> float:
    """Insert the blocks and prove the identity on real images.

    Args:
        model: The original model; moved to ``device`` and changed in place.
        config: The run; its recipe is read.
        size: Input size without the batch.
        images: (B, 3, H, W).
        device: Where the run computes.

    Returns:
        The largest absolute difference of the logits, 0.0.

    Raises:
        VerifyError: The operated model gives other logits.
    """
    model.to(device).eval()
    images = images.to(device)
    with torch.no_grad():
        original = model(images)
        apply(model, config.recipe, input_size=size)
        operated = model(images)
        with disabled(model):
            inside = model(images)
    difference = float((operated - original).abs().max())
    if not (torch.equal(operated, original) and torch.equal(inside, original)):
        raise VerifyError(
            f"the operated {type(model).__name__} differs from the original by {difference:g} on the "
            f"first batch: a block of the recipe is not the identity at init"
        )
    return difference


def _input_size(transform: Any, data: Data) -> tuple[int, ...]:
    image, _ = data.val[1](0)
    return tuple(transform(image).shape)


def _make_folder(config: FinetuneConfig) -> Path:
    folder = Path(config.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--work-dir {folder} cannot be made: {error.strerror}") from error
    return folder


def _fingerprint(config: FinetuneConfig, made: Plan) -> dict[str, Any]:
    """The settings a continuation must share with its run for the same numbers."""
    keys = ["model", "data", "epochs", "batch_size", "lr", "inserted_lr_mult", "weight_decay"]
    keys += ["optimizer", "warmup", "freeze_backbone", "amp", "augment", "image_size", "seed"]
    settings = {key: getattr(config, key) for key in keys}
    return {**settings, "blocks": [f"{row.fqn} {row.type}" for row in made.insertions]}


def _loaders(
    config: FinetuneConfig, data: Data, train_transform: Any, val_transform: Any
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    def loader(part: tuple[int, Any], transform: Any, training: bool) -> DataLoader[Any]:
        dataset = Images(*part, transform)
        return DataLoader(
            dataset,
            batch_size=config.batch_size,
            sampler=DefaultSampler(dataset, shuffle=training, seed=config.seed),
            num_workers=config.num_workers,
            collate_fn=default_collate,
            drop_last=training and part[0] > config.batch_size,
            worker_init_fn=_seed_worker if config.num_workers else None,
        )

    return loader(data.train, train_transform, True), loader(data.val, val_transform, False)


def _seed_worker(worker: int) -> None:
    """Seed a loader process from torch's per-epoch base seed."""
    worker_init_fn(worker, 1, 0, torch.initial_seed() % 2**31)


def _optimizer(config: FinetuneConfig, model: nn.Module, device: torch.device) -> OptimWrapper:
    if config.freeze_backbone:
        _freeze(model)
    groups = param_groups(
        model, config.lr, inserted_lr_mult=config.inserted_lr_mult, weight_decay=config.weight_decay
    )
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    if config.amp == "bf16":
        return AutocastWrapper(device.type, optimizer=optimizer)
    if config.amp == "fp16":
        return AmpOptimWrapper(optimizer=optimizer, dtype="float16")
    return OptimWrapper(optimizer=optimizer)


def _freeze(model: nn.Module) -> None:
    """Leave the inserted blocks and the classifier to train."""
    kept = {id(p) for p in inserted_parameters(model)}
    for name, parameter in model.named_parameters():
        head = name.partition(".")[0] in _CLASSIFIERS
        parameter.requires_grad_(head or id(parameter) in kept)


def _schedule(config: FinetuneConfig, num_steps: int) -> list[dict[str, Any]]:
    warm = int(num_steps * config.warmup)
    cosine = {"type": "CosineAnnealingLR", "by_epoch": False, "eta_min_ratio": 0.0}
    cosine |= {"begin": warm, "end": num_steps, "T_max": max(1, num_steps - warm)}
    if not warm:
        return [cosine]
    linear = {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": warm}
    return [linear, cosine]


def _runner(
    config: FinetuneConfig,
    folder: Path,
    backbone: nn.Module,
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    device: torch.device,
    history: History,
    state: dict[str, Any] | None,
    progress: Progress | None,
    made: Plan,
    say: Say,
) -> Runner:
    num_steps = config.epochs * len(loaders[0])
    hooks = [
        EpochSeedHook(config.seed),
        HistoryHook(history, num_steps, lambda score: say(_score_text(score))),
        StateHook(folder, history, _fingerprint(config, made), state),
    ]
    if progress is not None:
        hooks.append(ProgressHook(progress))
    return QuietRunner(
        model=Classifier(backbone).to(device),
        work_dir=str(folder),
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        train_cfg={"by_epoch": True, "max_epochs": config.epochs, "val_interval": 1},
        val_cfg={},
        val_evaluator=Evaluator([Accuracy()]),
        optim_wrapper=_optimizer(config, backbone, device),
        param_scheduler=_schedule(config, num_steps),
        default_hooks={"checkpoint": None, "sampler_seed": None},
        custom_hooks=hooks,
        randomness={"seed": config.seed},
        experiment_name=folder.resolve().name,
        default_scope="mmengine",
    )


def _score_text(score: dict[str, float]) -> str:
    when = f"after epoch {score['epoch']:.0f}" if score["epoch"] else "before the first step"
    return f"validation {when}: accuracy {score['accuracy']:.2f}%, loss {score['loss']:.4f}"


class QuietRunner(Runner):
    """The Runner with its log in ``train.log`` of the work dir, and only errors on the console."""

    def build_logger(
        self, log_level: int | str = "INFO", log_file: str | None = None, **options: Any
    ) -> MMLogger:
        """Make the logger; its file is continued by a resumed run."""
        path = str(Path(self.work_dir) / "train.log")
        logger = super().build_logger(log_level, path, file_mode="a", **options)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        return logger


def draw_attention(
    model: nn.Module, folder: Path, data: Data, transform: Any, device: torch.device
) -> tuple[Path, ...]:
    """Draw where each block attends in the first validation image.

    Args:
        model: The operated model.
        folder: The work dir; pictures go into ``attention/``.
        data: The run's data.
        transform: The evaluation transform.
        device: Where the model is.

    Returns:
        The pictures, one a block that has an attention map.
    """
    from timm.data import resolve_model_data_config

    from nlsurgery.viz.figure import attention_figure
    from nlsurgery.viz.images import seen_image

    image, _ = data.val[1](0)
    target = folder / "attention"
    target.mkdir(exist_ok=True)
    model.eval()
    tensor = transform(image)[None].to(device)
    # The transform crops, so the picture is made from what the model sees.
    resolved = resolve_model_data_config(model)
    seen = seen_image(tensor, mean=resolved["mean"], std=resolved["std"])
    return tuple(attention_figure(model, tensor, seen, None, target))
