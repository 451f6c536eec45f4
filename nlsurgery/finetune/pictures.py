"""Attention pictures at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nlsurgery.finetune.job import Job

#: The work dir's folder of pictures, and of how many images there are some.
ATTENTION_FOLDER = "attention"
_NUM_IMAGES = 2


def draw_attention(
    model: nn.Module, job: Job, folder: Path, device: torch.device, say: Callable[[str], None]
) -> tuple[Path, ...]:
    """Draw where each block attends in the first validation images of different classes.

    Args:
        model: The operated model.
        job: The run's data.
        folder: The work dir; pictures go into ``attention/``.
        device: Where the model is.
        say: Told when there is nothing to draw.

    Returns:
        The pictures: one an image and block that has an attention map.
    """
    from nlsurgery.viz.figure import attention_figure

    if job.view is None:
        say("no attention pictures: they are drawn for classifiers of images")
        return ()
    target = folder / ATTENTION_FOLDER
    target.mkdir(exist_ok=True)
    drawn: dict[str, list[Path]] = {}
    for index in range(min(50, len(job.val))):  # type: ignore[arg-type]
        tensor, picture, name = job.view(index)
        if name not in drawn:
            prefix = target / "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
            drawn[name] = attention_figure(model, tensor[None].to(device), picture, None, prefix)
        if len(drawn) == _NUM_IMAGES:
            break
    return tuple(path for paths in drawn.values() for path in paths)
