"""What happens along the way: seeds, measurements, progress, stopping early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from nlsurgery.finetune.history import History
from nlsurgery.finetune.seeding import derive_seed, seed_everything
from nlsurgery.finetune.sharding import full
from nlsurgery.reporting import inserted_blocks

#: A run keeps so many points of its loss, and looks at its gates so many times.
_LOSS_SAMPLES, _GATE_SAMPLES = 4000, 250
_STEP = 3

#: Called with the step, the number of steps, and what to show.
Progress = Callable[[int, int, Mapping[str, float]], None]


def trained_network(model: nn.Module) -> nn.Module:
    """The operated model inside the Runner's model, whatever wraps it."""
    inner: Any = model.module if is_model_wrapper(model) else model
    network: nn.Module = inner.backbone
    return network


class SeedHook(Hook):
    """Seeds every generator from (seed, step), and tells the sampler its epoch.

    Args:
        seed: Of the run.
    """

    priority = "VERY_HIGH"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rank, _ = get_dist_info()

    def before_train_epoch(self, runner: Runner) -> None:
        """Choose the order of the coming epoch."""
        runner.train_dataloader.sampler.set_epoch(runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed Python, numpy and torch for one step."""
        seed_everything(derive_seed(_STEP, self.seed, runner.iter, self.rank))


class HistoryHook(Hook):
    """Writes losses, rates, scores and gates into a :class:`History`.

    Args:
        history: What to fill.
        num_steps: Steps of the whole run.
        tell: Called with every score.
        progress: Called after every step.
    """

    #: Before the schedulers, so that the rate noted is the step's own.
    priority = "BELOW_NORMAL"

    def __init__(
        self,
        history: History,
        num_steps: int,
        tell: Callable[[dict[str, float]], None],
        progress: Progress | None = None,
    ) -> None:
        self.history = history
        self.loss_every = max(1, num_steps // _LOSS_SAMPLES)
        self.gate_every = max(1, num_steps // _GATE_SAMPLES)
        self.tell = tell
        self.progress = progress

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
        means = {name: _mean_over_processes(value) for name, value in (outputs or {}).items()}
        if step % self.loss_every == 0:
            rate = runner.optim_wrapper.get_lr()["lr"][0]
            self.history.steps.append({"step": step, "loss": means["loss"], "lr": rate})
        if step % self.gate_every == 0:
            sizes = gate_sizes(trained_network(runner.model))
            self.history.gates.append({"step": step, **sizes})
            runner.visualizer.add_scalars({f"gate/{k}": v for k, v in sizes.items()}, step=step)
        if self.progress is not None:
            self.progress(step, runner.max_iters, means)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Note the epoch's score."""
        score = {"epoch": runner.epoch, **(metrics or {})}
        self.history.scores.append(score)
        self.tell(score)


def _mean_over_processes(value: Any) -> float:
    number = value.detach().float().clone() if isinstance(value, Tensor) else torch.tensor(value)
    all_reduce(number, op="mean")
    return float(number)


def gate_sizes(model: nn.Module) -> dict[str, float]:
    """Root mean square of the gate of every inserted block that has one."""
    sizes = {}
    for name, block in inserted_blocks(model).items():
        gate = getattr(block, "gate", None)
        if isinstance(gate, Tensor):
            sizes[name] = float(full(gate).float().square().mean().sqrt())
    return sizes


class EarlyStopHook(Hook):
    """Ends a run whose score has not risen for some epochs.

    Args:
        history: Where the scores are.
        patience: How many epochs.
    """

    priority = "LOWEST"

    def __init__(self, history: History, patience: int) -> None:
        self.history = history
        self.patience = patience

    def before_train(self, runner: Runner) -> None:
        """End a continued run that had ended already."""
        self.after_val_epoch(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Look at the scores so far."""
        if self.history.stale_epochs >= self.patience:
            runner.train_loop.stop_training = True
