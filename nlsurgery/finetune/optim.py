"""What is trained, by which optimiser, at which rate, in which precision."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from nlsurgery.errors import SurgeryError
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.parameters import freeze_backbone, param_groups


class AutocastWrapper(OptimWrapper):
    """An optimiser wrapper whose forward runs under bf16 autocast, on CPU as well.

    mmengine's own AmpOptimWrapper refuses the CPU; bf16 needs no loss scaling.

    Args:
        device: Type of the device, such as ``cpu``.
        options: Of mmengine's OptimWrapper.
    """

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(**options)
        self._device_type = device

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter autocast around the forward of one step."""
        with super().optim_context(model), torch.autocast(self._device_type, torch.bfloat16):
            yield


def check_precision(config: FinetuneConfig, device: torch.device) -> None:
    """Refuse a precision that the device cannot train in.

    Raises:
        SurgeryError: fp16 anywhere but on CUDA.
    """
    if config.amp == "fp16" and device.type != "cuda":
        raise SurgeryError(f"--amp fp16 needs a CUDA device, but got {device.type}; use --amp bf16")


def freeze(model: nn.Module, head: Collection[str]) -> None:
    """Leave the inserted blocks and the head to train."""
    freeze_backbone(model)
    for name, parameter in model.named_parameters():
        if name in head:
            parameter.requires_grad_(True)


def make_optimizer(config: FinetuneConfig, model: nn.Module, device: torch.device) -> OptimWrapper:
    """Build the optimiser of a model's trainable parameters.

    Args:
        config: The run.
        model: The operated model, frozen as it shall be, on its device.
        device: Where it trains.
    """
    groups = param_groups(
        model, config.lr, inserted_lr_mult=config.inserted_lr_mult, weight_decay=config.weight_decay
    )
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "accumulative_counts": config.accumulate,
        "clip_grad": None if config.clip_grad is None else {"max_norm": config.clip_grad},
    }
    if config.amp == "bf16":
        return AutocastWrapper(device.type, **options)
    if config.amp == "fp16":
        return AmpOptimWrapper(dtype="float16", **options)
    return OptimWrapper(**options)


def make_schedule(config: FinetuneConfig, steps_per_epoch: int) -> list[dict[str, Any]]:
    """The learning rate over the steps, as mmengine's schedulers.

    Args:
        config: ``schedule``, ``warmup``, ``lr_steps`` and ``epochs`` are read.
        steps_per_epoch: Steps of one epoch.
    """
    num_steps = config.epochs * steps_per_epoch
    warm = int(num_steps * config.warmup)
    parts: list[dict[str, Any]] = []
    if warm:
        parts.append({"type": "LinearLR", "start_factor": 0.01, "begin": 0, "end": warm})
    if config.schedule == "cosine":
        length = max(1, num_steps - warm)
        parts.append(
            {"type": "CosineAnnealingLR", "eta_min": 0.0, "T_max": length, "begin": warm,
             "end": warm + length}
        )  # fmt: skip
    elif config.schedule == "step":
        epochs = config.lr_steps or (
            max(1, round(config.epochs * 2 / 3)), max(1, round(config.epochs * 8 / 9))
        )  # fmt: skip
        milestones = sorted({epoch * steps_per_epoch for epoch in epochs})
        parts.append({"type": "MultiStepLR", "milestones": milestones, "gamma": 0.1})
    return [{"by_epoch": False, **part} for part in parts]
