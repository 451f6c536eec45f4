"""The task ``detect``: torchvision's detectors on COCO data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nlsurgery.errors import DataError, ModelError
from nlsurgery.finetune.coco import CocoPart, CocoSamples, CocoScores, import_coco, read_part
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.job import Job
from nlsurgery.finetune.model import Trained
from nlsurgery.finetune.network import build_network
from nlsurgery.integrations.hub import takes_argument


class Detector(Trained):
    """A torchvision detector in the Runner; the norms of a pretrained one keep their statistics."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]], mode: str) -> Any:
        """Run one of the Runner's modes.

        Args:
            images: Each (3, H, W) in [0, 1].
            targets: Boxes (x1, y1, x2, y2), labels from 1, and masks or keypoints.
            mode: ``loss`` for a dict of losses, ``predict`` for a list of detections on the CPU.
        """
        if mode == "loss":
            losses = self.backbone(images, targets)
            return {
                name if "loss" in name else f"loss_{name}": value for name, value in losses.items()
            }
        found = self.backbone(images)
        return [{name: value.cpu() for name, value in item.items()} for item in found]


def detection_job(config: FinetuneConfig) -> Job:
    """Make a detection run ready.

    Raises:
        SurgeryError: Bad model, checkpoint or data.
    """
    import_coco()
    root = Path(config.data)
    if not root.is_dir():
        raise DataError(f"--data {config.data}: no such folder")
    train, val = read_part(root, "train"), read_part(root, "val")
    if train.categories != val.categories:
        raise DataError(f"{train.file} and {val.file} must have the same categories")
    torch.manual_seed(config.seed)
    sizes = {"num_classes": len(train.categories) + 1}
    if takes_argument(config.model, "num_keypoints"):
        sizes["num_keypoints"] = _same_keypoints(train, val)
    network, head = build_network(config, **sizes)
    size = _set_size(network, config)
    if config.checkpoint is not None or config.pretrained:
        freeze_norms(network)
    heads: Any = getattr(network, "roi_heads", None)
    masks = bool(heads is not None and heads.has_mask())
    keypoints = bool(heads is not None and heads.has_keypoint())
    flip = config.augment == "default"
    kinds = ["bbox", *["segm"] * masks, *["keypoints"] * keypoints]
    return Job(
        network=network,
        head=head,
        classes=train.names,
        train=CocoSamples(train, masks=masks, keypoints=keypoints, flip=flip),
        val=CocoSamples(val, masks=masks, keypoints=keypoints, flip=False),
        collate=_collate,
        wrap=Detector,
        metric=lambda: CocoScores(val, kinds),
        score="box_AP",
        input_size=(3, size, size),
        outputs=_outputs,
        view=None,
    )


def _same_keypoints(train: CocoPart, val: CocoPart) -> int:
    """The number of keypoints of each object.

    Raises:
        DataError: None, or not the same number everywhere.
    """
    numbers = sorted(train.num_keypoints | val.num_keypoints)
    if len(numbers) != 1 or numbers[0] == 0:
        raise DataError(
            f"{train.file} and {val.file} must give each object the same number of keypoints for such a "
            f"model, but got {', '.join(map(str, numbers)) or 'no object'}"
        )
    return numbers[0]


def _collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> list[list[Any]]:
    return [[image for image, _ in samples], [target for _, target in samples]]


def _set_size(network: nn.Module, config: FinetuneConfig) -> int:
    """Set the short side that a detector scales images to; returns it.

    Raises:
        ModelError: The model is no detector of torchvision.
    """
    transform: Any = getattr(network, "transform", None)
    if type(transform).__name__ != "GeneralizedRCNNTransform":
        raise ModelError(
            f"--task detect trains torchvision's detectors (fasterrcnn_resnet50_fpn, "
            f"maskrcnn_resnet50_fpn, retinanet_resnet50_fpn, ...), but {config.model} is none"
        )
    if config.image_size is not None:
        transform.min_size = (config.image_size,)
        transform.max_size = 2 * config.image_size
        if transform.fixed_size is not None:
            transform.fixed_size = (config.image_size, config.image_size)
    return int(transform.min_size[-1])


def freeze_norms(network: nn.Module) -> None:
    """Freeze a pretrained detector's BatchNorms: two images a step are too few for statistics."""
    for module in network.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _outputs(model: nn.Module, batch: Any) -> Sequence[Tensor]:
    """Detections and the backbone's features: a fresh head may detect nothing."""
    inner: Any = model
    device = next(model.parameters()).device
    images = [image.to(device) for image in batch[0]]
    tensors = [value for found in inner(images) for value in found.values()]
    features = inner.backbone(inner.transform(images)[0].tensors)
    return [*tensors, *features.values()]
