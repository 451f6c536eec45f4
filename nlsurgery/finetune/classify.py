"""The task ``classify``: images, or clips, with one label each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import default_collate
from torch import Tensor, nn

from nlsurgery.errors import DataError
from nlsurgery.finetune.clips import ClipTransform, check_video, clip_transforms, video_files
from nlsurgery.finetune.config import DEMO, FinetuneConfig
from nlsurgery.finetune.folders import are_videos, check_files, check_image, list_split
from nlsurgery.finetune.images import (
    Part,
    Samples,
    data_config,
    digits,
    image_files,
    image_transforms,
    timm_dataset,
)
from nlsurgery.finetune.job import Job
from nlsurgery.finetune.metrics import Accuracy
from nlsurgery.finetune.model import Classifier, logits_of
from nlsurgery.finetune.network import build_network
from nlsurgery.viz.images import Picture, seen_image

_TIMM_PREFIXES = ("torch", "hfds", "tfds", "wds", "hfids")


def classification_job(config: FinetuneConfig) -> Job:
    """Make a classification run ready.

    Raises:
        SurgeryError: Bad model, checkpoint or data.
    """
    classes, train, val, videos = read_parts(config)
    torch.manual_seed(config.seed)
    network, head = build_network(config, num_classes=len(classes))
    make_transforms = clip_transforms if videos else image_transforms
    train_transform, val_transform = make_transforms(config, network)
    val_samples = Samples(val, val_transform, classes)
    size = tuple(val_samples[0][0].shape)
    if isinstance(val_transform, ClipTransform):
        mean, std = val_transform.mean, val_transform.std
    else:
        data = data_config(config, network)
        mean, std = data["mean"], data["std"]

    def view(index: int) -> tuple[Tensor, Picture, str]:
        tensor, label = val_samples[index]
        return tensor, seen_image(tensor[None], mean=mean, std=std), classes[label]

    return Job(
        network=network,
        head=head,
        classes=classes,
        train=Samples(train, train_transform, classes),
        val=val_samples,
        collate=default_collate,
        wrap=Classifier,
        metric=Accuracy,
        score="accuracy",
        input_size=size,
        outputs=_outputs,
        view=view,
    )


def _outputs(model: nn.Module, batch: Any) -> Sequence[Tensor]:
    device = next(model.parameters()).device
    return logits_of(model(batch[0].to(device)))


def read_parts(config: FinetuneConfig) -> tuple[tuple[str, ...], Part, Part, bool]:
    """Find and check the samples of a run.

    Returns:
        Class names, the training and the validation set, and whether they are videos.

    Raises:
        DataError: Missing, empty, not images or videos, or one class only.
    """
    if config.data == DEMO:
        return *digits(config.val_share), False
    path = Path(config.data)
    if path.is_dir():
        return _folder(path, config)
    if path.exists():
        raise DataError(
            f"--data {config.data} is a file; give a folder with one sub-folder a class"
        )
    if "/" in config.data and config.data.partition("/")[0] in _TIMM_PREFIXES:
        return *timm_dataset(config), False
    raise DataError(
        f"--data {config.data}: no such folder, and no timm dataset name (torch/NAME, hfds/NAME)"
    )


def _folder(root: Path, config: FinetuneConfig) -> tuple[tuple[str, ...], Part, Part, bool]:
    classes, train, val = list_split(root, config.val_share)
    videos = are_videos([*train, *val])
    check_files([*train, *val], check_video if videos else check_image)
    if videos:
        return classes, video_files(train), video_files(val), True
    return classes, image_files(train), image_files(val), False
