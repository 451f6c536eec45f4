"""Folders of classes: listing, holding out, and reading every file's header before training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from nlsurgery.errors import DataError

#: Up to so many files have their headers read before training; of more, an even sample.
_MAX_CHECKED = 50_000
#: Files of these kinds are videos, whole folders of which make a set of clips.
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"})

Labelled = tuple[Path, int]


def list_split(
    root: Path, val_share: float
) -> tuple[tuple[str, ...], list[Labelled], list[Labelled]]:
    """List a folder of classes, or one with ``train`` and ``val`` (or ``validation``) of them.

    Args:
        root: The folder.
        val_share: Share of every class held out where the folder has no ``val``.

    Returns:
        The class names in label order, the training files and the validation files.

    Raises:
        DataError: Missing or empty folders, fewer than two classes, or different ones.
    """
    train_root, val_root = root / "train", root / "val"
    if not val_root.is_dir() and (root / "validation").is_dir():
        val_root = root / "validation"
    if train_root.is_dir() != val_root.is_dir():
        there, missing = ("train", "val") if train_root.is_dir() else (val_root.name, "train")
        raise DataError(
            f"{root} has {there}/ but no {missing}/: give both, or one folder a class to split"
        )
    if not train_root.is_dir():
        classes = class_names(root)
        return classes, *hold_out(list_files(root, classes), val_share)
    classes, other = class_names(train_root), class_names(val_root)
    if classes != other:
        odd = [
            f"{name!r} is in {train_root.name if name in classes else val_root.name}/ only"
            for name in sorted(set(classes) ^ set(other))[:3]
        ]
        raise DataError(
            f"{root}: train/ and {val_root.name}/ must have the same classes, but {', '.join(odd)}"
        )
    return classes, list_files(train_root, classes), list_files(val_root, classes)


def class_names(root: Path) -> tuple[str, ...]:
    """The sub-folders of ``root``, two at least.

    Raises:
        DataError: There are fewer.
    """
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(
            f"{root} must hold one sub-folder a class, two at least, but has "
            f"{repr(names[0]) + ' alone' if names else 'none'}"
        )
    return tuple(names)


def list_files(root: Path, classes: Sequence[str]) -> list[Labelled]:
    """Every file below each class's folder, hidden ones left out, with its label.

    Raises:
        DataError: A class has no file.
    """
    found: list[Labelled] = []
    for label, name in enumerate(classes):
        files = sorted(
            p for p in (root / name).rglob("*") if p.is_file() and not p.name.startswith(".")
        )
        if not files:
            raise DataError(f"{root / name} holds no file: add some, or take the folder away")
        found += [(path, label) for path in files]
    return found


def hold_out(files: Sequence[Labelled], share: float) -> tuple[list[Labelled], list[Labelled]]:
    """Hold out the same share of every class, by a shuffle that is always the same.

    Returns:
        Training and validation files.

    Raises:
        DataError: A class is too small to be split.
    """
    train: list[Labelled] = []
    val: list[Labelled] = []
    for label in sorted({label for _, label in files}):
        mine = [item for item in files if item[1] == label]
        random.Random(label).shuffle(mine)
        count = max(1, round(len(mine) * share))
        if count >= len(mine):
            raise DataError(
                f"{mine[0][0].parent} has {len(mine)} file(s), too few to hold {count} out for "
                f"validation: add more, or give train/ and val/"
            )
        val += mine[:count]
        train += mine[count:]
    return train, val


def are_videos(files: Sequence[Labelled]) -> bool:
    """Whether a folder is one of videos.

    Raises:
        DataError: It mixes videos and other files.
    """
    videos = [path.suffix.lower() in VIDEO_SUFFIXES for path, _ in files]
    if any(videos) and not all(videos):
        odd = files[videos.index(False)][0]
        raise DataError(f"{odd} lies among videos, but is none; take it out of the data folder")
    return all(videos)


def check_files(files: Sequence[Labelled], check: Callable[[Path], None]) -> None:
    """Run a cheap check over all files, or an even sample of very many."""
    step = max(1, len(files) // _MAX_CHECKED)
    for path, _ in files[::step]:
        check(path)


def check_image(path: Path) -> None:
    """Read an image's header.

    Raises:
        DataError: It is no image.
    """
    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image; take it out of the data folder") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{path} is no readable image ({error}); take it out of the data folder"
        ) from error
