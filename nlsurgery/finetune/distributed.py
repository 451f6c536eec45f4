"""Several processes, as torchrun starts them: joining, wrapping the model, leaving."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from mmengine.model import MMDistributedDataParallel
from torch import distributed, nn

from nlsurgery.errors import SurgeryError
from nlsurgery.reporting import inserted_blocks


@contextmanager
def process_group(device: str | None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and choose this one's device.

    mmengine's own start calls CUDA even for gloo, so the group is made here.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N`` (of a single process), or None for what there is.

    Raises:
        SurgeryError: There is no such device.
    """
    several = num_processes() > 1
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")) if several else None)
    if not several or distributed.is_initialized():
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        distributed.destroy_process_group()
        # gloo's threads live as long as anything refers to the group, and one that needs Python's lock
        # while the interpreter ends aborts the process: end them here (in a sharded run see leave()).
        gc.collect()


def choose_device(device: str | None, local_rank: int | None) -> torch.device:
    """The device of a process.

    Args:
        device: What the user asked for; None for what there is.
        local_rank: The process's number on its machine; None for a single process.

    Raises:
        SurgeryError: There is no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise SurgeryError(
            f"--device {name!r} is no device of torch (cpu, cuda, cuda:1)"
        ) from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise SurgeryError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
        index = chosen.index if local_rank is None else local_rank
        if index is not None and index >= torch.cuda.device_count():
            raise SurgeryError(
                f"--device {name}: process or index {index}, but there are "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return chosen


def is_first_process() -> bool:
    """Whether this process prints and writes; known before the processes have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many processes train together; known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> NoReturn:
    """End one of several processes at once, with exit code 0 and without the interpreter's end.

    For what keeps the group, and with it gloo's threads, to the very end: torch's caches of sharded
    operations do.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share_norms(network: nn.Module, device: torch.device) -> nn.Module:
    """Let the BatchNorms of several CUDA processes use the statistics of the whole batch.

    Only CUDA has such norms; for the CPU see :mod:`nlsurgery.finetune.shared_norm`.

    Args:
        network: The original model, or an operated one whose blocks alone are converted.
        device: Where it trains.

    Returns:
        The model, converted where it can be.
    """
    if device.type != "cuda" or not distributed.is_initialized():
        return network
    from timm.layers import convert_sync_batchnorm

    blocks = inserted_blocks(network)
    for block in blocks.values():
        convert_sync_batchnorm(block)
    return network if blocks else convert_sync_batchnorm(network)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the Runner's model in mmengine's DDP when there are several processes."""
    if not distributed.is_initialized():
        return model
    wrapped: nn.Module = MMDistributedDataParallel(
        module=model, device_ids=[device] if device.type == "cuda" else None
    )
    return wrapped
