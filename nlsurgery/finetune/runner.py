"""The Runner of a run: mmengine's, with its log in one file and nothing else on disk."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn

from nlsurgery.finetune.checkpoints import StateHook
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.history import History
from nlsurgery.finetune.hooks import EarlyStopHook, HistoryHook, Progress, SeedHook
from nlsurgery.finetune.job import Job
from nlsurgery.finetune.loading import make_loaders
from nlsurgery.finetune.optim import make_optimizer, make_schedule
from nlsurgery.finetune.sharding import ShardedEMAHook, make_model
from nlsurgery.finetune.stopping import StopSignal

LOG_FILE = "train.log"
_NAMES = iter(range(1, 1_000_000))


class QuietRunner(Runner):
    """The Runner with its log in ``train.log`` of the work dir, and only errors on the console."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with contextlib.suppress(OSError):
            Path(self._log_dir).rmdir()  # mmengine makes it, and nothing here writes to it

    def build_logger(
        self, log_level: int | str = "INFO", log_file: str | None = None, **options: Any
    ) -> MMLogger:
        """Make the logger; its file is continued by a resumed run."""
        path = str(Path(self.work_dir) / LOG_FILE)
        logger = super().build_logger(log_level, path, file_mode="a", **options)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        return logger

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Leave the model where it is: the Runner would move it to a GPU on its own."""
        return model

    def _init_model_weights(self) -> None:
        """Leave the weights as they are: sending the first process's shards to all would mix them up."""

    def train(self) -> nn.Module:
        """Train, without mmengine's false alarms."""
        with warnings.catch_warnings():
            # While gradients are added up, the schedulers step before the first optimiser step.
            warnings.filterwarnings("ignore", message=r"Detected call of `scheduler\.step\(\)`")
            # Its buckets are contiguous, channels-last gradients are not; the numbers are the same.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            trained: nn.Module = super().train()
            return trained

    def dump_config(self) -> None:
        """Write nothing: the resolved configuration lies in the work dir already."""

    def close(self) -> None:
        """Close the log and the visualizer's files."""
        self.visualizer.close()
        for handler in list(self.logger.handlers):
            handler.close()
            self.logger.removeHandler(handler)


def make_runner(
    config: FinetuneConfig,
    job: Job,
    device: torch.device,
    history: History,
    *,
    fingerprint: Mapping[str, Any],
    state: dict[str, Any] | None,
    spare: nn.Module | None,
    stop: StopSignal,
    tell: Callable[[dict[str, float]], None],
    progress: Progress | None,
) -> QuietRunner:
    """Assemble the Runner.

    Args:
        config: The run.
        job: Its operated model (on ``device``, frozen as it shall be) and data.
        device: Where it trains.
        history: Filled along the way.
        fingerprint: Kept in every saved state.
        state: What to go on from, None to start anew.
        spare: In a sharded run, a whole copy of the operated model to save the weights with.
        stop: Tells that the process was asked to end.
        tell: Called with every score.
        progress: Called after every step.
    """
    loaders = make_loaders(config, job.train, job.val, job.collate)
    folder = Path(config.work_dir)
    hooks: list[Any] = [
        SeedHook(config.seed),
        HistoryHook(history, config.epochs * len(loaders[0]), tell, progress),
        StateHook(folder, history, fingerprint, state, config.save_every, stop, spare),
    ]
    if config.ema is not None:
        kind = ShardedEMAHook if config.shard else EMAHook
        hooks.append(kind(momentum=1 - config.ema, update_buffers=True))
    if config.early_stop is not None:
        hooks.append(EarlyStopHook(history, config.early_stop))
    model = make_model(config, job, device)
    optimizer = make_optimizer(config, job.network, device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mmengine")
        return QuietRunner(
            model=model,
            work_dir=str(folder),
            train_dataloader=loaders[0],
            val_dataloader=loaders[1],
            train_cfg={"by_epoch": True, "max_epochs": config.epochs, "val_interval": 1},
            val_cfg={},
            val_evaluator=Evaluator([job.metric()]),
            optim_wrapper=optimizer,
            param_scheduler=make_schedule(config, len(loaders[0])) or None,
            default_hooks={"checkpoint": None, "sampler_seed": None},
            custom_hooks=hooks,
            visualizer=_visualizer(config, folder),
            randomness={"seed": config.seed},
            experiment_name=f"nlsurgery-{next(_NAMES)}",
            default_scope="mmengine",
        )


def _visualizer(config: FinetuneConfig, folder: Path) -> dict[str, Any]:
    backends = []
    if config.tensorboard:
        backends.append({"type": "TensorboardVisBackend", "save_dir": str(folder / "tensorboard")})
    return {"type": "Visualizer", "vis_backends": backends}
