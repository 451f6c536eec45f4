"""An image file as the model sees it, and the same view as a picture to draw on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nlsurgery.errors import DataError

#: Long side, in pixels, that a view is drawn at, if the photo has that many.
DISPLAY_SIZE = 640


#: A picture, or the frames of a clip.
Picture = Image.Image | tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class View:
    """The part of a photo, or of a clip, that a model sees.

    Attributes:
        tensor: (1, 3, H, W), or (1, 3, T, H, W) of a clip, float32, normalised.
        display: The same part at a size to look at; of a clip, each of its T frames.
        box: Its place in the photo, (left, top, right, bottom) in pixels.
    """

    tensor: Tensor
    display: Picture
    box: tuple[float, float, float, float]

    def relative(self, x: float, y: float) -> tuple[float, float]:
        """Turn a point into relative coordinates of the view.

        Args:
            x: From the left: pixels of the photo when above 1 (or y is), else relative to the view.
            y: From the top, likewise.

        Raises:
            DataError: The point lies outside the view.
        """
        left, top, right, bottom = self.box
        if max(x, y) > 1:
            across, down = (x - left) / (right - left), (y - top) / (bottom - top)
        else:
            across, down = x, y
        if not (0 <= across <= 1 and 0 <= down <= 1):
            seen = f"x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"
            raise DataError(
                f"--point {x:g},{y:g} lies outside the part of the image that the model sees "
                f"({seen} in pixels, or 0 to 1)"
            )
        return across, down


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB, turned the way its EXIF data says.

    Raises:
        DataError: No such file, or no image in it.
    """
    from PIL import ImageOps

    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            return upright.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{path}: cannot be read as an image ({reason})") from error


def view_image(
    image: Image.Image,
    size: tuple[int, int],
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    crop: float = 1.0,
) -> View:
    """Cut the middle out of a photo and scale it to the model's input size.

    Args:
        image: The photo.
        size: (H, W) of the model's input.
        mean: Mean of each colour, in [0, 1].
        std: Standard deviation of each colour.
        crop: Share of the short side that is kept, in (0, 1] (timm's ``crop_pct``).
    """
    return View(*_seen_part(image, size, mean, std, crop))


def view_clip(
    frames: Sequence[Image.Image],
    size: tuple[int, int],
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    crop: float = 1.0,
) -> View:
    """Cut the middle out of every frame and scale it to the model's input size.

    Args:
        frames: The clip's, all of one size.
        size: (H, W) of the model's input.
        mean: Mean of each colour, in [0, 1].
        std: Standard deviation of each colour.
        crop: Share of the short side that is kept, in (0, 1].
    """
    seen = [_seen_part(frame, size, mean, std, crop) for frame in frames]
    tensors, displays, boxes = zip(*seen, strict=True)
    return View(torch.stack(tensors, dim=2), displays, boxes[0])


def _seen_part(
    image: Image.Image,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop: float,
) -> tuple[Tensor, Image.Image, tuple[float, float, float, float]]:
    """The tensor (1, 3, H, W), the picture and the box of :class:`View`."""
    height, width = size
    scale = crop * min(image.width / width, image.height / height)
    box_width, box_height = scale * width, scale * height
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    seen = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.asarray(seen, dtype=np.float32) / 255.0).permute(2, 0, 1)
    centre = torch.tensor(mean).view(3, 1, 1)
    spread = torch.tensor(std).view(3, 1, 1)
    zoom = DISPLAY_SIZE / max(height, width)
    shown = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    display = image.resize(shown, Image.Resampling.BICUBIC, box=box)
    return ((pixels - centre) / spread).unsqueeze(0), display, box


def seen_image(
    tensor: Tensor,
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> Picture:
    """Turn a model's input back into a picture: just what it saw, at its size.

    Args:
        tensor: (1, 3, H, W), or (1, 3, T, H, W) of a clip, normalised.
        mean: Mean of each colour that was subtracted, in [0, 1].
        std: Standard deviation of each colour that was divided by.
    """

    def picture(pixels: Tensor) -> Image.Image:
        pixels = pixels.detach().float().cpu()
        pixels = pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        colours = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        return Image.fromarray(colours.contiguous().numpy())

    if tensor.ndim == 5:
        return tuple(picture(frame) for frame in tensor[0].unbind(1))
    return picture(tensor[0])
