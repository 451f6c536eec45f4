"""Attention pictures at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nlsurgery.finetune.job import Job

#: The work dir's folder of pictures.
ATTENTION_FOLDER = "attention"


def draw_attention(
    model: nn.Module,
    job: Job,
    num_images: int,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Path, ...]:
    """Draw where each block attends in the first validation images or clips of different classes.

    Args:
        model: The operated model.
        job: The run's data.
        num_images: How many images at most.
        folder: The work dir; pictures go into ``attention/``.
        device: Where the model is.
        say: Told when there is nothing to draw.

    Returns:
        The pictures: one an image and block that has an attention map.
    """
    from nlsurgery.viz.figure import attention_figure

    if num_images == 0:
        return ()
    if job.view is None:
        say("no attention pictures: they are drawn for classifiers")
        return ()
    target = folder / ATTENTION_FOLDER
    target.mkdir(exist_ok=True)
    drawn: dict[str, list[Path]] = {}
    for index in range(min(25 * num_images, len(job.val))):  # type: ignore[arg-type]
        tensor, picture, name = job.view(index)
        if name not in drawn:
            prefix = target / "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
            drawn[name] = attention_figure(model, tensor[None].to(device), picture, None, prefix)
        if len(drawn) == num_images:
            break
    return tuple(path for paths in drawn.values() for path in paths)
