from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nlsurgery.viz.capture import AttentionRows
from nlsurgery.viz.figure import block_figure, draw_rows, strongest_keys

DISPLAY = Image.new("RGB", (300, 200), (90, 90, 90))


def rows_with(weights: torch.Tensor, stride: tuple[int, int] = (1, 1)) -> AttentionRows:
    _, height, width = weights.shape
    size = (height * stride[0], width * stride[1])
    queries = ((0, 0),) * len(weights)
    return AttentionRows(
        "a.nlsurgery.0", "NonLocal", size, (height, width), stride, queries, weights
    )


def panel(rows: AttentionRows, points: list[tuple[float, float]], index: int) -> np.ndarray:
    """The pixels of one panel, cut out of the drawn figure."""
    figure = block_figure(rows, DISPLAY, points)
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    box = figure.axes[index].get_window_extent()
    top = drawn.shape[0] - round(box.y1)
    return drawn[top : top + round(box.height), round(box.x0) : round(box.x1)]


@pytest.mark.parametrize("key", [(0, 0), (1, 4), (3, 2)])
def test_heat_glows_where_the_weight_is(key: tuple[int, int]) -> None:
    weights = torch.zeros(1, 4, 6)
    weights[0][key] = 1.0
    # The query lies on the key, so that no arrow crosses the picture.
    point = ((key[1] + 0.5) / 6, (key[0] + 0.5) / 4)
    pixels = panel(rows_with(weights), [point], 1)
    height, width, _ = pixels.shape
    colourful = pixels.max(axis=2) - pixels.min(axis=2)
    cells = colourful[: height // 4 * 4, : width // 6 * 6]
    means = cells.reshape(4, height // 4, 6, width // 6).mean(axis=(1, 3))
    assert np.unravel_index(means.argmax(), means.shape) == key


def test_pooled_keys_of_an_odd_map_leave_the_margin_dark() -> None:
    rows = AttentionRows(
        "a.nlsurgery.0", "NonLocal", (5, 5), (2, 2), (2, 2), ((0, 0),), torch.ones(1, 2, 2)
    )
    pixels = panel(rows, [(0.1, 0.1)], 1)
    colourful = pixels.max(axis=2) - pixels.min(axis=2)
    height, width = colourful.shape
    assert colourful[round(0.85 * height) :, :].max() < 5
    assert colourful[:, round(0.85 * width) :].max() < 5
    assert colourful[round(0.5 * height), round(0.5 * width)] > 50


def test_arrows_go_to_the_strongest_keys_first() -> None:
    weights = np.array([[0.1, 0.4, 0.0], [0.3, 0.01, 0.2]], dtype=np.float32)
    assert strongest_keys(weights, limit=3) == [(0, 1), (1, 0), (1, 2)]
    assert strongest_keys(weights, floor=0.6) == [(0, 1), (1, 0)]


def test_no_arrow_where_no_weight_is_positive() -> None:
    assert strongest_keys(np.array([[-0.5, 0.0]], dtype=np.float32)) == []


@pytest.mark.parametrize("num_points", [1, 4, 9])
def test_each_query_has_a_panel_besides_the_image(num_points: int) -> None:
    points = [(0.5, 0.5)] * num_points
    figure = block_figure(rows_with(torch.rand(num_points, 4, 6)), DISPLAY, points)
    assert len(figure.axes) == num_points + 1
    for ax in figure.axes:
        box = ax.get_window_extent()
        assert box.width / box.height == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
    ("weights", "caption"),
    [
        (torch.tensor([[[0.5, 0.25], [0.25, 0.0]]]), "strongest of 4 keys: 50.0%"),
        (torch.tensor([[[-0.5, 0.25], [0.25, 0.0]]]), "weights -0.5 to 0.25"),
        (torch.zeros(1, 2, 2), "attends nowhere"),
    ],
    ids=["softmax", "signed", "zero"],
)
def test_caption_tells_how_far_from_uniform(weights: torch.Tensor, caption: str) -> None:
    figure = block_figure(rows_with(weights), DISPLAY, [(0.5, 0.5)])
    assert figure.axes[1].get_title() == caption


def test_one_file_per_block_in_a_folder_or_under_a_prefix(tmp_path: Path) -> None:
    rows = [rows_with(torch.rand(1, 4, 6))]
    (in_folder,) = draw_rows(rows, DISPLAY, [(0.5, 0.5)], tmp_path)
    (prefixed,) = draw_rows(rows, DISPLAY, [(0.5, 0.5)], tmp_path / "new" / "cat")
    assert in_folder == tmp_path / "a.nlsurgery.0.png"
    assert prefixed == tmp_path / "new" / "cat-a.nlsurgery.0.png"
    for path in (in_folder, prefixed):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width > 500


def clip_rows(weights: torch.Tensor, query: tuple[int, int, int]) -> AttentionRows:
    size = tuple(weights.shape[1:])
    queries = (query,) * len(weights)
    return AttentionRows("a.nlsurgery.0", "NonLocal", size, size, (1, 1, 1), queries, weights)


def test_a_query_in_a_clip_has_a_line_of_frames() -> None:
    weights = torch.zeros(2, 4, 3, 3)
    weights[:, 2, 1, 0] = 3.0
    weights[:, 0, 0, 0] = 1.0
    frames = tuple(Image.new("RGB", (300, 200), (90, 90, 90)) for _ in range(16))
    points = [(0.9, 0.9, 0.9), (0.5, 0.5)]
    figure = block_figure(clip_rows(weights, (3, 2, 2)), frames, points)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["frame 3: 25.0%", "frame 7: 0.0%", "frame 11: 75.0%", "frame 15: 0.0%"] * 2
    marks = [ax for ax in figure.axes if ax.lines]
    assert marks == [figure.axes[3], figure.axes[7]]
    targets = {(patch.axesB, patch.xy2) for patch in figure.artists}  # type: ignore[attr-defined]
    assert {axes for axes, _ in targets} == {figure.axes[i] for i in (0, 2, 4, 6)}
    brightest = [
        int(np.unravel_index(np.asarray(ax.images[0].get_array()).sum(2).argmax(), (320, 480))[0])
        for ax in (figure.axes[2], figure.axes[0])
    ]
    assert brightest[0] // 107 == 1
    assert brightest[1] // 107 == 0


@pytest.mark.parametrize("num_times", [1, 8, 21])
def test_no_more_frames_of_a_clip_are_shown_than_fit(num_times: int) -> None:
    frames = tuple(Image.new("RGB", (60, 40)) for _ in range(32))
    figure = block_figure(
        clip_rows(torch.rand(1, num_times, 2, 2), (0, 0, 0)), frames, [(0.1, 0.1, 0.0)]
    )
    assert len(figure.axes) == min(num_times, 8)


def test_drawing_leaves_pyplot_alone() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "from PIL import Image\n"
        "from nlsurgery.viz.capture import AttentionRows\n"
        "from nlsurgery.viz.figure import block_figure\n"
        "rows = AttentionRows('a', 'b', (2, 2), (2, 2), (1, 1), ((0, 0),), torch.rand(1, 2, 2))\n"
        "block_figure(rows, Image.new('RGB', (32, 32)), [(0.5, 0.5)]).canvas.draw()\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
