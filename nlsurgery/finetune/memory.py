"""Out of memory: an error that says which setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nlsurgery.errors import SurgeryError
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.planning import Plan
from nlsurgery.tables import count_text


class OutOfMemoryError(SurgeryError, MemoryError):
    """A run that needs more memory than the device has."""


@contextmanager
def explain_out_of_memory(config: FinetuneConfig, made: Plan) -> Iterator[None]:
    """Turn an allocation that failed into advice.

    Args:
        config: The run.
        made: Its plan, for the block that keeps most.

    Raises:
        OutOfMemoryError: An allocation failed inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no memory left").splitlines()[0]
        raise OutOfMemoryError(f"out of memory: {reason}\n{advice(config, made)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on CUDA or the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text.lower()


def advice(config: FinetuneConfig, made: Plan) -> str:
    """The settings that need less memory, the one that changes the numbers least first."""
    lines = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        lines.append(
            f"--batch-size {half} --accumulate {2 * config.accumulate}: half the samples at a time, "
            f"the same number for each change of the weights"
        )
    if config.amp == "off":
        lines.append("--amp bf16: activations of half the size")
    size = made.input_size[-1]
    if config.image_size is None or config.image_size > 64:
        lines.append(f"--image-size {max(32, size // 4 * 3)}: smaller images")
    if not config.freeze_backbone:
        lines.append("--freeze-backbone: no gradients before the first block")
    largest = max(made.insertions, key=lambda row: row.activation_bytes)
    lines.append(
        f"a recipe with sub_sample: true, or without {largest.fqn}, which keeps "
        f"{count_text(largest.activation_bytes, 'B')} a sample"
    )
    return "Any of these needs less:\n" + "\n".join(f"  {line}" for line in lines)
