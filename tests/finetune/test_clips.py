"""Clips: which frames are taken, how files are checked, and a run on a video model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import nlsurgery
from nlsurgery.errors import DataError
from nlsurgery.finetune import FinetuneConfig
from nlsurgery.finetune.clips import (
    ClipTransform,
    Video,
    check_video,
    clip_indices,
    clip_transforms,
    count_frames,
)
from nlsurgery.integrations.hub import create_model
from tests.finetune.conftest import finetune, run_values


def write_video(path: Path, frames: int = 12, size: int = 48, rightwards: bool = True) -> None:
    """A bright square that moves across a dark picture; frame k is as bright as its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((size, size, 3), 10, dtype=np.uint8)
            place = number if rightwards else frames - 1 - number
            left = place * (size - 12) // max(1, frames - 1)
            picture[:12] = 15 * number
            picture[18:30, left : left + 12] = 230
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three videos each."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("left", "right"):
        (root / name).mkdir()
        for index in range(3):
            write_video(root / name / f"{index}.mp4", 12 + index, rightwards=name == "right")
    return root


@pytest.mark.parametrize(
    ("num_frames", "start", "expected"),
    [
        pytest.param(20, 0.0, [0, 2, 4, 6], id="first"),
        pytest.param(20, 1.0, [13, 15, 17, 19], id="last"),
        pytest.param(7, 0.5, [0, 2, 4, 6], id="just-fits"),
        pytest.param(4, 0.5, [0, 1, 2, 3], id="short"),
        pytest.param(1, 0.5, [0, 0, 0, 0], id="one-frame"),
    ],
)
def test_clip_indices(num_frames: int, start: float, expected: list[int]) -> None:
    assert clip_indices(num_frames, 4, 2, start) == expected


def test_frames_are_the_ones_asked_for(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 10)
    assert count_frames(tmp_path / "a.mp4") == 10
    frames = Video(tmp_path / "a.mp4", 10).read([1, 4, 9])
    assert frames.shape == (3, 3, 48, 48)
    brightness = frames[:, :, 2:10, :].float().mean((1, 2, 3))
    assert brightness.tolist() == pytest.approx([15, 60, 135], abs=8)


def test_clip_is_cropped_and_normalised(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    clip = ClipTransform(4, 2, 36, (32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(
        Video(tmp_path / "a.mp4", 12)
    )
    assert clip.shape == (3, 4, 32, 32)
    assert -2.05 <= clip.min() < clip.max() <= 2.05


@pytest.mark.parametrize(
    ("content", "word"),
    [
        pytest.param(b"no video", "no readable video", id="text"),
        pytest.param(b"", "no readable", id="empty"),
    ],
)
def test_file_that_is_no_video_is_named(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "b.mp4").write_bytes(content)
    with pytest.raises(DataError, match=rf"b\.mp4 is {word}"):
        check_video(tmp_path / "b.mp4")


def test_image_among_videos_is_named(videos: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    for name in ("left", "right"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in (videos / name).iterdir():
            (tmp_path / "data" / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "right" / "cover.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cover\.png lies among videos"):
        finetune(values, data=str(tmp_path / "data"))


def test_image_model_on_videos_is_refused(videos: Path, values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no video model of torchvision"):
        finetune(values, data=str(videos))


@pytest.mark.parametrize(
    ("name", "length", "crop", "mean"),
    [("r3d_18", 16, 112, 0.43216), ("mvit_v2_s", 16, 224, 0.45), ("s3d", 16, 224, 0.43216)],
)
def test_transforms_are_the_weights_own(name: str, length: int, crop: int, mean: float) -> None:
    from torch import nn

    config = FinetuneConfig.make(model=name, recipe="x", data="x")
    training, evaluation = clip_transforms(config, nn.Identity())
    assert isinstance(evaluation, ClipTransform)
    assert isinstance(training, ClipTransform)
    assert (evaluation.length, evaluation.crop) == (length, (crop, crop))
    assert evaluation.mean[0] == pytest.approx(mean)
    assert (training.training, evaluation.training) == (True, False)


def test_video_model_trains_and_loads(videos: Path, tmp_path: Path) -> None:
    values = run_values(videos, tmp_path / "work")
    recipe = {
        "version": 1,
        "inserts": [{"stage": "res3", "block": {"type": "non_local", "sub_sample": True}}],
    }
    result, said = finetune(
        values, model="torchvision/r3d_18", recipe=recipe, image_size=32, clip_frames=4, epochs=1,
        batch_size=2, freeze_backbone=True, pictures=2,
    )  # fmt: skip
    assert result.max_difference == 0
    assert len(result.pictures) == 2, "one block, a clip of each class"
    assert all(path.is_file() for path in result.pictures)
    assert not any("no attention pictures" in line for line in said)
    model = create_model("r3d_18", num_classes=2)
    nlsurgery.load(model, result.model_file)
    assert any(block.gate.abs().max() > 0 for block in nlsurgery.inserted_blocks(model).values())
