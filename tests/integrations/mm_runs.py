"""Small trainings on real digits with mmengine's Runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, FUNCTIONS, HOOKS, METRICS, Registry
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from tests.integrations.mm_models import backbone

DIGITS = Registry(
    "dataset", parent=DATASETS, scope="toys", locations=["tests.integrations.mm_runs"]
)
SCORES = Registry("metric", parent=METRICS, scope="toys", locations=["tests.integrations.mm_runs"])
COLLATES = Registry(
    "function", parent=FUNCTIONS, scope="toys", locations=["tests.integrations.mm_runs"]
)
WATCHERS = Registry("hook", parent=HOOKS, scope="toys", locations=["tests.integrations.mm_runs"])


class KilledError(Exception):
    """Stands for the end of a process in the middle of an epoch."""


@WATCHERS.register_module()
class KillAt(Hook):
    """Raise after a number of iterations."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        if runner.iter + 1 == self.iteration:
            raise KilledError


@DIGITS.register_module()
class Digits(Dataset[tuple[Tensor, int]]):
    """Scanned digits of scikit-learn, 8×8 brought to ``size``, three channels."""

    def __init__(self, start: int, stop: int, size: int = 32) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images[start:stop]).float().sub(8).div(8)[:, None]
        big = torch.nn.functional.interpolate(images, size=(size, size), mode="nearest")
        self.images = big.expand(-1, 3, -1, -1).contiguous()
        self.labels = [int(label) for label in data.target[start:stop]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


@DIGITS.register_module()
class DigitSamples(Digits):
    """The same, each as mmpretrain takes it."""

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        from mmpretrain.structures import DataSample

        image, label = super().__getitem__(index)
        return {"inputs": image, "data_samples": DataSample().set_gt_label(label)}


@COLLATES.register_module()
def stack_samples(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Images in one tensor, samples in a list."""
    return {
        "inputs": torch.stack([item["inputs"] for item in items]),
        "data_samples": [item["data_samples"] for item in items],
    }


@SCORES.register_module()
class Hits(BaseMetric):
    """Share of right predictions."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [
            float((s["pred_label"].reshape(()) == s["gt_label"].reshape(())).item())
            for s in data_samples
        ]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"accuracy": sum(results) / len(results)}


def loader(start: int, stop: int, *, shuffle: bool) -> dict[str, Any]:
    return {
        "batch_size": 8,
        "num_workers": 0,
        "dataset": {"type": "toys.Digits", "start": start, "stop": stop},
        "sampler": {"type": "DefaultSampler", "shuffle": shuffle, "seed": 0},
        "collate_fn": {"type": "default_collate"},
    }


def make_runner(folder: Path, *, epochs: int = 1, **changes: Any) -> Runner:
    """A Runner over 64 digits that validates and saves every epoch.

    Args:
        folder: Its work_dir.
        epochs: How long to train.
        changes: Further fields of the config, in place of the ones here.
    """
    config = {
        "model": {"type": "toys.ToyClassifier", "backbone": backbone()},
        "work_dir": str(folder),
        "train_dataloader": loader(0, 64, shuffle=True),
        "val_dataloader": loader(64, 96, shuffle=False),
        "train_cfg": {"by_epoch": True, "max_epochs": epochs, "val_interval": 1},
        "val_cfg": {},
        "val_evaluator": {"type": "toys.Hits"},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}},
        "param_scheduler": {"type": "MultiStepLR", "milestones": [1], "gamma": 0.5},
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": 4},
            "checkpoint": {"type": "CheckpointHook", "interval": 1},
        },
        "visualizer": {"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
        "randomness": {"seed": 0},
        "default_scope": "mmengine",
        "log_level": "WARNING",
        "experiment_name": f"{folder.name}_{len(list(folder.iterdir())) if folder.is_dir() else 0}",
        **changes,
    }
    return Runner.from_cfg(Config(config))
