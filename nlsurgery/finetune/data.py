"""Images with labels: folders of classes, timm's datasets, and the demo's digits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from nlsurgery.errors import DataError
from nlsurgery.finetune.config import DEMO, FinetuneConfig
from nlsurgery.integrations.demo import demo_digits

#: Up to so many files have their headers read before training; of more, an even sample.
_MAX_CHECKED = 50_000

Transform = Callable[[Image.Image], Tensor]
Loader = Callable[[int], tuple[Image.Image, int]]


class Images(Dataset[tuple[Tensor, int]]):
    """Images and labels with a transform.

    Args:
        num_items: How many there are.
        item: Index to (RGB image, label).
        transform: Image to (3, H, W).
    """

    def __init__(self, num_items: int, item: Loader, transform: Transform) -> None:
        self._num_items = num_items
        self.item = item
        self.transform = transform

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.item(index)
        return self.transform(image), label


@dataclass(frozen=True, slots=True)
class Data:
    """A training and a validation set.

    Attributes:
        num_classes: How many classes both have.
        classes: Their names in label order.
        train: Index to (RGB image, label), with its size.
        val: The same of the validation set.
    """

    classes: tuple[str, ...]
    train: tuple[int, Loader]
    val: tuple[int, Loader]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


def read_data(config: FinetuneConfig) -> Data:
    """Find and check the images of a run.

    Raises:
        DataError: Missing, empty, not images, or one class only.
    """
    if config.data == DEMO:
        return _digits(config)
    path = Path(config.data)
    if path.is_dir():
        return _folder(path, config)
    if path.exists():
        raise DataError(
            f"--data {config.data} is a file; give a folder with one sub-folder a class"
        )
    if config.data.partition("/")[0] in ("torch", "hfds", "tfds", "wds", "hfids"):
        return _timm_dataset(config)
    raise DataError(
        f"--data {config.data}: no such folder, and no timm dataset name (torch/..., hfds/..., "
        f"tfds/..., wds/...)"
    )


def _digits(config: FinetuneConfig) -> Data:
    images, labels = demo_digits()
    order = np.random.default_rng(0).permutation(len(images))
    held_out = int(len(images) * config.val_share)

    def loader(indices: np.ndarray) -> tuple[int, Loader]:
        def item(index: int) -> tuple[Image.Image, int]:
            place = indices[index]
            return Image.fromarray(images[place]).convert("RGB"), int(labels[place])

        return len(indices), item

    classes = tuple(str(digit) for digit in range(10))
    return Data(classes, loader(order[held_out:]), loader(order[:held_out]))


def _folder(root: Path, config: FinetuneConfig) -> Data:
    train_root, val_root = root / "train", root / "val"
    if not val_root.is_dir() and (root / "validation").is_dir():
        val_root = root / "validation"
    if train_root.is_dir() and val_root.is_dir():
        classes = _class_names(train_root)
        other = _class_names(val_root)
        if classes != other:
            odd = sorted(set(classes) ^ set(other))[:3]
            raise DataError(
                f"{train_root} and {val_root} must have the same classes; differ: {odd}"
            )
        train, val = _list_files(train_root, classes), _list_files(val_root, classes)
    else:
        classes = _class_names(root)
        everything = _list_files(root, classes)
        train, val = _split(everything, config)
    _check_headers([path for path, _ in (*train, *val)])
    return Data(classes, _file_loader(train), _file_loader(val))


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(
            f"{root} must hold one sub-folder a class, two at least, but has "
            f"{names[0] + ' alone' if names else 'none'}"
        )
    return tuple(names)


def _list_files(root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    found = []
    for label, name in enumerate(classes):
        files = sorted(
            p for p in (root / name).rglob("*") if p.is_file() and not p.name.startswith(".")
        )
        if not files:
            raise DataError(f"{root / name} holds no image")
        found += [(path, label) for path in files]
    return found


def _split(
    files: list[tuple[Path, int]], config: FinetuneConfig
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Hold out the same share of every class, by a fixed shuffle."""
    train, val = [], []
    for label in sorted({label for _, label in files}):
        mine = [item for item in files if item[1] == label]
        random.Random(0).shuffle(mine)
        count = max(1, round(len(mine) * config.val_share))
        if count >= len(mine):
            raise DataError(
                f"{mine[0][0].parent} has {len(mine)} image(s): too few to hold {count} out for "
                f"validation"
            )
        val += mine[:count]
        train += mine[count:]
    return train, val


def _check_headers(paths: Sequence[Path]) -> None:
    step = max(1, len(paths) // _MAX_CHECKED)
    for path in paths[::step]:
        try:
            with Image.open(path):
                pass
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise DataError(
                f"{path} is no readable image ({error}); take it out of the data folder"
            ) from error


def _file_loader(files: Sequence[tuple[Path, int]]) -> tuple[int, Loader]:
    def item(index: int) -> tuple[Image.Image, int]:
        path, label = files[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), label
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error

    return len(files), item


def _timm_dataset(config: FinetuneConfig) -> Data:
    from timm.data import create_dataset

    def make(split: str, training: bool) -> Any:
        try:
            return create_dataset(
                config.data, root=config.data_root, split=split, is_training=training
            )
        except Exception as error:
            raise DataError(f"timm dataset {config.data!r}, split {split!r}: {error}") from error

    train, val = make("train", True), make("validation", False)
    names = getattr(train, "classes", None)
    labels = getattr(train, "targets", None)
    if names is None and labels is None:
        raise DataError(f"timm dataset {config.data!r} does not say its classes")
    classes = tuple(map(str, names if names is not None else sorted(set(labels or ()))))

    def loader(dataset: Any) -> tuple[int, Loader]:
        def item(index: int) -> tuple[Image.Image, int]:
            image, label = dataset[index]
            return image.convert("RGB"), int(label)

        return len(dataset), item

    return Data(classes, loader(train), loader(val))


def make_transforms(config: FinetuneConfig, model: torch.nn.Module) -> tuple[Transform, Transform]:
    """Training and evaluation transforms from timm's data config of the model.

    Args:
        config: The run; ``augment`` and ``image_size`` are read.
        model: The backbone; models without a data config get ImageNet's mean and deviation.
    """
    from timm.data import create_transform, resolve_model_data_config

    resolved = resolve_model_data_config(model)
    if config.image_size is not None:
        resolved["input_size"] = (resolved["input_size"][0], config.image_size, config.image_size)
    evaluation = create_transform(**resolved, is_training=False)
    if config.augment == "none":
        return evaluation, evaluation
    mild: dict[str, Any] = {}
    if config.augment == "light":
        mild = {"hflip": 0.0, "scale": (0.8, 1.0), "ratio": (0.9, 1.1), "color_jitter": None}
    training = create_transform(**resolved, is_training=True, **mild)
    return training, evaluation
