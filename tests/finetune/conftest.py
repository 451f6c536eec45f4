"""A small folder of real digits, and a small run on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from nlsurgery.checkpoint import read_state_dict
from nlsurgery.finetune import FinetuneConfig, FinetuneResult, run

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


def run_values(digits: Path, work_dir: Path) -> dict[str, Any]:
    """A run of two epochs of three steps that takes seconds."""
    return {
        "model": "timm/test_resnet",
        "recipe": RECIPE,
        "data": str(digits),
        "epochs": 2,
        "batch_size": 16,
        "lr": 0.02,
        "image_size": 48,
        "num_workers": 0,
        "augment": "light",
        "device": "cpu",
        "pictures": 0,
        "work_dir": str(work_dir),
    }


@pytest.fixture
def values(digits: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two epochs of three steps that takes seconds."""
    return run_values(digits, tmp_path / "work")


def finetune(values: dict[str, Any], **changes: Any) -> tuple[FinetuneResult, list[str]]:
    """Run with some values changed; returns what it came to and what it said."""
    said: list[str] = []
    progress = changes.pop("progress", None)
    config = FinetuneConfig.make(**{**values, **changes})
    return run(config, say=said.append, progress=progress), said


def saved(result: FinetuneResult) -> dict[str, Any]:
    """What two runs with the same numbers have in common: scores, losses, weights."""
    weights = read_state_dict(result.model_file)
    history = json.loads((result.work_dir / "history.json").read_text())
    return {"weights": {key: value.tolist() for key, value in weights.items()}, **history}
