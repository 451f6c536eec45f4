"""From samples to batches: an order and an augmentation that follow from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Dataset, Sampler

from nlsurgery.errors import DataError
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.seeding import derive_seed, seed_everything

Collate = Callable[[list[Any]], Any]

_ORDER, _SAMPLE = 1, 2


class SeededSamples(Dataset[Any]):
    """A data set asked for by (epoch, index), whose augmentation follows from both.

    Args:
        samples: The data set, asked for by index.
        seed: Of the run.
    """

    def __init__(self, samples: Dataset[Any], seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self.metainfo = getattr(samples, "metainfo", {})

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_everything(derive_seed(_SAMPLE, self.seed, epoch, index))
        return self.samples[index]


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffles by (seed, epoch), deals every step's samples out to the processes, skips steps done.

    Args:
        num_samples: Size of the training set.
        batch_size: Samples a step, of all processes together.
        seed: Of the run.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.rank, self.world_size = get_dist_info()
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        #: Steps of the coming epoch that are done already.
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        count: int = self.num_samples // self.batch_size * self.batch_size // self.world_size
        return count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator()
        generator.manual_seed(derive_seed(_ORDER, self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        order = order[: self.num_samples // self.batch_size * self.batch_size]
        first = self.skip * self.batch_size
        self.skip = 0
        for index in order[first + self.rank :: self.world_size]:
            yield self.epoch, index


def make_loaders(
    config: FinetuneConfig, train: Dataset[Any], val: Dataset[Any], collate: Collate
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Make the loaders of this process.

    A last step with fewer samples than ``batch_size`` is left out of each epoch; a training set that is
    smaller than that is one step.

    Args:
        config: ``batch_size``, ``num_workers`` and ``seed`` are read.
        train: Training samples by index.
        val: Validation samples by index.
        collate: Makes a batch of a list of samples.

    Raises:
        DataError: The batch cannot be dealt out evenly to the processes.
    """
    _, world_size = get_dist_info()
    num_samples = len(train)  # type: ignore[arg-type]
    batch_size = config.batch_size
    if batch_size > num_samples:
        batch_size = num_samples // world_size * world_size
    if batch_size == 0 or batch_size % world_size:
        raise DataError(
            f"--batch-size {config.batch_size} ({num_samples} training samples) must be a multiple of "
            f"the {world_size} processes that share it"
        )
    local = batch_size // world_size
    common: dict[str, Any] = {
        "batch_size": local,
        "num_workers": config.num_workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available() and config.device != "cpu",
    }
    sampler = EpochSampler(num_samples, batch_size, config.seed)
    training = DataLoader(
        SeededSamples(train, config.seed), sampler=sampler, drop_last=True, **common
    )
    return training, DataLoader(val, sampler=DefaultSampler(val, shuffle=False), **common)
