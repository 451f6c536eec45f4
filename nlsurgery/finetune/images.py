"""Images with labels: folders of classes, timm's datasets, and the demo's digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from nlsurgery.errors import DataError
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.folders import Labelled
from nlsurgery.integrations.demo import demo_digits

Transform = Callable[[Any], Tensor]
#: Index to (RGB image or frames, label).
Item = Callable[[int], tuple[Any, int]]


@dataclass(frozen=True, slots=True)
class Part:
    """A training or validation set before its transform.

    Attributes:
        num_samples: How many there are.
        item: Index to (RGB image or frames, label).
    """

    num_samples: int
    item: Item


class Samples(Dataset[tuple[Tensor, int]]):
    """Transformed samples with labels, by index.

    Args:
        part: The samples.
        transform: Image to (3, H, W), or frames to (3, T, H, W).
        classes: Names in label order.
    """

    def __init__(self, part: Part, transform: Transform, classes: Sequence[str]) -> None:
        self.part = part
        self.transform = transform
        self.metainfo = {"classes": tuple(classes)}

    def __len__(self) -> int:
        return self.part.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample, label = self.part.item(index)
        return self.transform(sample), label


def digits(val_share: float) -> tuple[tuple[str, ...], Part, Part]:
    """The demo's digits: class names, training and validation set."""
    images, labels = demo_digits()
    order = np.random.default_rng(0).permutation(len(images))
    held_out = int(len(images) * val_share)

    def part(indices: np.ndarray) -> Part:
        def item(index: int) -> tuple[Image.Image, int]:
            place = indices[index]
            return Image.fromarray(images[place]).convert("RGB"), int(labels[place])

        return Part(len(indices), item)

    classes = tuple(str(digit) for digit in range(10))
    return classes, part(order[held_out:]), part(order[:held_out])


def image_files(files: Sequence[Labelled]) -> Part:
    """Image files as a set; one that cannot be decoded is an error that names it."""

    def item(index: int) -> tuple[Image.Image, int]:
        path, label = files[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), label
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{path} cannot be decoded: {error}; take it out of the data folder"
            ) from error

    return Part(len(files), item)


def timm_dataset(config: FinetuneConfig) -> tuple[tuple[str, ...], Part, Part]:
    """A dataset by timm's name: class names, training and validation set.

    Raises:
        DataError: It cannot be made, is streamed, or does not tell its classes.
    """
    from timm.data import create_dataset

    def make(split: str, training: bool) -> Any:
        try:
            dataset = create_dataset(
                config.data, root=config.data_root, split=split, is_training=training,
                download=config.data_download,
            )  # fmt: skip
        except Exception as error:
            hint = "" if config.data_download else "; --data-download fetches what can be fetched"
            raise DataError(
                f"timm dataset {config.data!r}, split {split!r}, under --data-root "
                f"{config.data_root}: {error}{hint}"
            ) from error
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"timm dataset {config.data!r} is a stream, which has no fixed order to resume in: "
                f"give a folder, or a torch/... or hfds/... dataset"
            )
        return dataset

    train, val = make("train", True), make("validation", False)
    classes = _class_names(train)
    if not classes:
        raise DataError(f"timm dataset {config.data!r} does not say its classes")

    def part(dataset: Any) -> Part:
        def item(index: int) -> tuple[Image.Image, int]:
            image, label = dataset[index]
            return image.convert("RGB"), int(label)

        return Part(len(dataset), item)

    return classes, part(train), part(val)


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None:
        names = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
        names = None if names is None else sorted(names, key=names.__getitem__)
    if names is None and getattr(dataset, "targets", None) is not None:
        names = range(max(int(label) for label in dataset.targets) + 1)
    return () if names is None else tuple(map(str, names))


def image_transforms(config: FinetuneConfig, model: nn.Module) -> tuple[Transform, Transform]:
    """Training and evaluation transforms from timm's data config of the model.

    Args:
        config: ``augment`` and ``image_size`` are read.
        model: The backbone; models without a data config get ImageNet's mean and deviation.
    """
    from timm.data import create_transform

    resolved = data_config(config, model)
    evaluation = create_transform(**resolved, is_training=False)
    if config.augment == "none":
        return evaluation, evaluation
    mild: dict[str, Any] = {}
    if config.augment == "light":
        mild = {"hflip": 0.0, "scale": (0.8, 1.0), "ratio": (0.9, 1.1), "color_jitter": None}
    return create_transform(**resolved, is_training=True, **mild), evaluation


def data_config(config: FinetuneConfig, model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model (input size, mean, deviation, crop) at the run's image size."""
    from timm.data import resolve_model_data_config

    resolved: dict[str, Any] = resolve_model_data_config(model)
    if config.image_size is not None:
        resolved["input_size"] = (resolved["input_size"][0], config.image_size, config.image_size)
    return resolved
