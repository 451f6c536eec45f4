"""Clips with labels: video files decoded by PyAV."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlsurgery.errors import DataError
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.folders import Labelled
from nlsurgery.finetune.images import Part, Transform
from nlsurgery.integrations.hub import find_model

_INSTALL = "pip install 'nlsurgery[video]'"

#: Reads chosen frames: indices to (T, H, W, 3) of uint8.
Frames = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Video:
    """A video whose frames are decoded when they are asked for.

    Attributes:
        path: The file.
        num_frames: How many it has.
    """

    path: Path
    num_frames: int

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode chosen frames.

        Args:
            indices: Of the frames, rising, in [0, num_frames).

        Returns:
            (T, 3, H, W) of uint8.

        Raises:
            DataError: They cannot be decoded.
        """
        av = import_av()
        wanted = set(indices)
        found: dict[int, np.ndarray] = {}
        try:
            with av.open(str(self.path)) as container:
                for place, frame in enumerate(container.decode(video=0)):
                    if place in wanted:
                        found[place] = frame.to_ndarray(format="rgb24")
                    if place >= indices[-1]:
                        break
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DataError(
                f"{self.path} cannot be decoded: {error}; take it out of the data folder"
            ) from error
        if not found:
            raise DataError(f"{self.path} holds no frame; take it out of the data folder")
        last = max(found)
        frames = np.stack([found[index] if index in found else found[last] for index in indices])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


def import_av() -> Any:
    """Import PyAV.

    Raises:
        DataError: It is not installed.
    """
    try:
        import av
    except ImportError:
        raise DataError(f"reading videos needs PyAV, which is not installed: {_INSTALL}") from None
    return av


def check_video(path: Path) -> None:
    """Read a video's header.

    Raises:
        DataError: It holds no video stream, or is none at all.
    """
    av = import_av()
    try:
        with av.open(str(path)) as container:
            streams = len(container.streams.video)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DataError(
            f"{path} is no readable video ({error}); take it out of the data folder"
        ) from error
    if not streams:
        raise DataError(f"{path} holds no video stream; take it out of the data folder")


def count_frames(path: Path) -> int:
    """Frames of a video: what its header says, or else counted by reading its packets.

    Raises:
        DataError: It cannot be read, or has none.
    """
    av = import_av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is no readable video ({error})") from error
    if count < 1:
        raise DataError(f"{path} holds no frame; take it out of the data folder")
    return int(count)


def video_files(files: Sequence[Labelled]) -> Part:
    """Video files as a set."""

    def item(index: int) -> tuple[Video, int]:
        path, label = files[index]
        return Video(path, count_frames(path)), label

    return Part(len(files), item)


def clip_indices(num_frames: int, length: int, stride: int, start: float) -> list[int]:
    """The frames of a clip: every ``stride``-th, closer together in a short video.

    Args:
        num_frames: Of the video.
        length: Frames a clip.
        stride: Frames of the video between two of the clip.
        start: Where the clip lies in what is left over, in [0, 1].
    """
    span = min(num_frames - 1, (length - 1) * stride)
    first = start * (num_frames - 1 - span)
    step = span / max(1, length - 1)
    return [round(first + step * place) for place in range(length)]


@dataclass(frozen=True, slots=True)
class ClipTransform:
    """A video to a normalised clip (3, T, H, W).

    Attributes:
        length: Frames a clip.
        stride: Frames of the video between two of the clip.
        resize: Short side, in pixels, before the crop.
        crop: (H, W).
        mean: Mean of each colour, in [0, 1].
        std: Standard deviation of each colour.
        training: Take a random clip and a random crop, the same for all frames.
        flip: Mirror half of the training clips.
    """

    length: int
    stride: int
    resize: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    training: bool = False
    flip: bool = False

    def __call__(self, video: Video) -> Tensor:
        """Decode, crop and normalise one clip."""
        start = random.random() if self.training else 0.5
        indices = clip_indices(video.num_frames, self.length, self.stride, start)
        frames = video.read(indices).float() / 255
        height, width = frames.shape[2:]
        scale = max(self.resize / min(height, width), self.crop[0] / height, self.crop[1] / width)
        size = (max(self.crop[0], round(height * scale)), max(self.crop[1], round(width * scale)))
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True)
        spare = (size[0] - self.crop[0], size[1] - self.crop[1])
        top, left = (
            (random.randint(0, spare[0]), random.randint(0, spare[1]))
            if self.training
            else (spare[0] // 2, spare[1] // 2)
        )
        frames = frames[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        if self.flip and random.random() < 0.5:
            frames = frames.flip(3)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((frames - mean) / std).transpose(0, 1).contiguous()


def clip_transforms(config: FinetuneConfig, model: nn.Module) -> tuple[Transform, Transform]:
    """Training and evaluation transforms from what torchvision publishes with the model's weights.

    Args:
        config: ``model``, ``image_size``, ``clip_frames``, ``frame_stride`` and ``augment`` are read.
        model: The model; not looked at, for the weights' description has it all.

    Raises:
        DataError: The model is no video model of torchvision.
    """
    import torchvision

    library, name = find_model(config.model)
    weights: Any = None
    if library == "torchvision":
        weights = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    preset = None if weights is None else weights.transforms()
    if weights is None or preset is None or type(preset).__name__ != "VideoClassification":
        raise DataError(
            f"--data {config.data} holds videos, but {config.model} is no video model of torchvision "
            f"(r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v2_s, swin3d_t, ...)"
        )
    crop, resize = preset.crop_size[0], min(preset.resize_size)
    if config.image_size is not None:
        resize = round(resize * config.image_size / crop)
        crop = config.image_size
    frames = config.clip_frames or weights.meta.get("min_temporal_size", 16)
    common: dict[str, Any] = {
        "length": max(frames, 16) if config.clip_frames is None else frames,
        "stride": config.frame_stride,
        "resize": resize,
        "crop": (crop, crop),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }
    evaluation = ClipTransform(**common)
    if config.augment == "none":
        return evaluation, evaluation
    return ClipTransform(**common, training=True, flip=config.augment == "default"), evaluation
