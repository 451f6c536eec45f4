"""What happens along the way: measuring, progress, and randomness that follows from the epoch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from nlsurgery.finetune.history import History
from nlsurgery.reporting import inserted_blocks

#: A gate is looked at this many times a run.
_GATE_SAMPLES = 200


class EpochSeedHook(Hook):
    """Seeds every generator from (seed, epoch), so that a resumed epoch repeats the original."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed Python, numpy and torch."""
        seed_everything(self.seed * 100_003 + runner.epoch)
        sampler = runner.train_dataloader.sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(runner.epoch)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class HistoryHook(Hook):
    """Writes losses, rates, scores and gates into a :class:`History`.

    Args:
        history: What to fill.
        num_steps: Steps of the whole run.
        tell: Called with every score.
    """

    priority = "LOW"

    def __init__(
        self, history: History, num_steps: int, tell: Callable[[dict[str, float]], None]
    ) -> None:
        self.history = history
        self.every = max(1, num_steps // _GATE_SAMPLES)
        self.tell = tell

    def before_train(self, runner: Runner) -> None:
        """Score the validation set before the first step of a run that starts anew."""
        if not self.history.scores:
            runner.val_loop.run()
            runner.model.train()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Note the step's loss and rate, and now and then the gates."""
        step = runner.iter + 1
        rate = runner.optim_wrapper.get_lr()["lr"][0]
        self.history.steps.append(
            {"step": step, "loss": float(outputs["loss"].detach()), "lr": rate}
        )
        if step % self.every == 0:
            self.history.gates.append({"step": step, **gate_sizes(runner.model.backbone)})

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Note the epoch's score."""
        if metrics is not None:
            score = {"epoch": runner.epoch, **metrics}
            self.history.scores.append(score)
            self.tell(score)


def gate_sizes(model: torch.nn.Module) -> dict[str, float]:
    """Root mean square of the gate of every inserted block that has one."""
    sizes = {}
    for name, block in inserted_blocks(model).items():
        gate = getattr(block, "gate", None)
        if isinstance(gate, torch.Tensor):
            sizes[name] = float(gate.detach().float().square().mean().sqrt())
    return sizes


class ProgressHook(Hook):
    """Tells a reporter how far the run is.

    Args:
        report: Called with (step, number of steps, loss, accuracy in percent).
    """

    def __init__(self, report: Callable[[int, int, float, float], None]) -> None:
        self.report = report

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Report one step."""
        loss, accuracy = float(outputs["loss"].detach()), 100 * float(outputs["accuracy"])
        self.report(runner.iter + 1, runner.max_iters, loss, accuracy)
