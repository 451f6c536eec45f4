from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nlsurgery.errors import DataError
from nlsurgery.viz.images import read_image, seen_image, view_image


def test_view_is_the_middle_at_the_model_s_size() -> None:
    view = view_image(Image.new("RGB", (600, 300), (255, 0, 127)), (224, 224))
    assert view.tensor.shape == (1, 3, 224, 224)
    assert view.box == (150.0, 0.0, 450.0, 300.0)
    assert view.display.size == (640, 640)
    colour = torch.tensor([1.0, 0.0, 127 / 255])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(view.tensor[0, :, 9, 9], (colour - mean) / std)


def test_view_shows_what_lies_in_the_box() -> None:
    pixels = np.zeros((300, 600, 3), dtype=np.uint8)
    pixels[:, 150:300] = (255, 0, 0)
    view = view_image(Image.fromarray(pixels), (60, 60), mean=(0, 0, 0), std=(1, 1, 1))
    red = view.tensor[0, 0]
    torch.testing.assert_close(red[:, 2:28], torch.ones(60, 26))
    torch.testing.assert_close(red[:, 32:], torch.zeros(60, 28))


@pytest.mark.parametrize(
    ("point", "relative"),
    [((0.25, 1.0), (0.25, 1.0)), ((300, 150), (0.5, 0.5)), ((150, 0), (0.0, 0.0))],
    ids=["relative", "middle", "corner"],
)
def test_points_are_pixels_or_shares(
    point: tuple[float, float], relative: tuple[float, float]
) -> None:
    view = view_image(Image.new("RGB", (600, 300)), (224, 224))
    assert view.relative(*point) == pytest.approx(relative)


@pytest.mark.parametrize("point", [(100, 150), (300, 301), (599, 0)])
def test_point_outside_the_view_is_refused(point: tuple[float, float]) -> None:
    view = view_image(Image.new("RGB", (600, 300)), (224, 224))
    with pytest.raises(DataError, match="outside the part of the image that the model sees"):
        view.relative(*point)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    for path, reason in (
        (text, "not an image"),
        (cut, "cannot be read as an image"),
        (tmp_path / "none.png", "no such image file"),
        (tmp_path, "cannot be read as an image"),
    ):
        with pytest.raises(DataError, match=reason) as raised:
            read_image(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (20, 10)).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_exif_turn_is_undone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (10, 20)


def test_seen_image_undoes_the_normalisation() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    view = view_image(Image.fromarray(pixels), (24, 32), mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 1.0))
    seen = seen_image(view.tensor, mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 1.0))
    np.testing.assert_array_equal(np.asarray(seen), pixels)
