"""What a run will take, measured by a few of its own steps; nothing is written."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.distributed import is_first_process, process_group
from nlsurgery.finetune.loading import make_loaders
from nlsurgery.finetune.memory import explain_out_of_memory
from nlsurgery.finetune.optim import make_optimizer
from nlsurgery.finetune.seeding import keep_random_state
from nlsurgery.finetune.sharding import make_model
from nlsurgery.finetune.shared_norm import shared_statistics
from nlsurgery.finetune.training import Say, prepare, say_nothing
from nlsurgery.tables import count_text

#: Steps measured, after one that warms up.
_NUM_MEASURED = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take.

    Attributes:
        num_steps: Training steps of the whole run.
        num_train: Training samples.
        num_val: Validation samples.
        num_trainable: Parameters that are trained.
        step_seconds: Median of the measured steps, loading included.
        val_seconds: Of one pass over the validation set, from its first batch.
        total_seconds: Of the whole run.
        peak_bytes: Largest memory: of CUDA's allocator, or of the whole process on the CPU.
        device: Where it was measured.
    """

    num_steps: int
    num_train: int
    num_val: int
    num_trainable: int
    step_seconds: float
    val_seconds: float
    total_seconds: float
    peak_bytes: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kind = "of the device" if self.device.startswith("cuda") else "of the whole process"
        total = timedelta(seconds=round(self.total_seconds))
        return (
            f"{self.num_train:,} training and {self.num_val:,} validation samples, "
            f"{self.num_trainable:,} parameters to train\n"
            f"memory: {count_text(self.peak_bytes, 'B')} at most, {kind} ({self.device})\n"
            f"time:   {self.num_steps:,} steps of {self.step_seconds:.3f} s, "
            f"{self.val_seconds:.1f} s a validation, {total} in all"
        )


def estimate(config: FinetuneConfig, *, say: Say = print) -> Estimate:
    """Do all that a run does before its first save, then a few steps, and extrapolate.

    Args:
        config: The run.
        say: Called with every message for the user.

    Raises:
        SurgeryError: What :func:`nlsurgery.finetune.run` would raise.
    """
    if not is_first_process():
        say = say_nothing
    with process_group(config.device) as device, keep_random_state():
        return _estimate(config, device, say)


def _estimate(config: FinetuneConfig, device: torch.device, say: Say) -> Estimate:
    prepared = prepare(config, device, say)
    job = prepared.job
    with explain_out_of_memory(config, prepared.plan), shared_statistics(device):
        train, val = make_loaders(config, job.train, job.val, job.collate)
        model = make_model(config, job, device)
        optimizer = make_optimizer(config, job.network, device)
        step = _measure_steps(model, train, optimizer, device)
        scoring = _measure_scoring(model, val, device)
    num_steps = config.epochs * len(train)
    return Estimate(
        num_steps=num_steps,
        num_train=len(job.train),  # type: ignore[arg-type]
        num_val=len(job.val),  # type: ignore[arg-type]
        num_trainable=sum(p.numel() for p in job.network.parameters() if p.requires_grad),
        step_seconds=step,
        val_seconds=scoring,
        total_seconds=num_steps * step + (config.epochs + 1) * scoring,
        peak_bytes=peak_memory(device),
        device=str(device),
    )


def _measure_steps(model: Any, loader: Any, optimizer: OptimWrapper, device: torch.device) -> float:
    """Seconds a training step takes, loading included."""
    model.train()
    batches = iter(loader)
    times = []
    for place in range(min(_NUM_MEASURED + 1, len(loader))):
        seconds = _seconds(lambda: model.train_step(next(batches), optimizer), device)
        if place or len(loader) == 1:
            times.append(seconds)
    return statistics.median(times)


def _measure_scoring(model: nn.Module, loader: Any, device: torch.device) -> float:
    """Seconds a pass over the validation set takes, from its first batch."""
    model.eval()
    scored: Any = model
    batches = iter(loader)
    with torch.no_grad():
        return len(loader) * _seconds(lambda: scored.val_step(next(batches)), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes that were in use at most so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
