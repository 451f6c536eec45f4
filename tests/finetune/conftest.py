"""A small folder of real digits, and a small run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

RECIPE = {
    "version": 1,
    "inserts": [
        {"stage": "res3", "block": {"type": "non_local"}},
        {"stage": "res4", "block": {"type": "self_attention"}},
    ],
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of scikit-learn's digits as PNG files, 20 of each."""
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for digit in (0, 1, 7):
        folder = root / f"digit{digit}"
        folder.mkdir()
        for index, image in enumerate(data.images[data.target == digit][:20]):
            pixels = (image * 15.9).astype("uint8")
            Image.fromarray(pixels).resize((32, 32)).save(folder / f"{index:02d}.png")
    return root


@pytest.fixture
def values(digits: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two epochs of three steps that takes seconds."""
    return {
        "model": "timm/resnet10t",
        "recipe": RECIPE,
        "data": str(digits),
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.02,
        "image_size": 48,
        "num_workers": 0,
        "augment": "light",
        "device": "cpu",
        "work_dir": str(tmp_path / "work"),
    }
