"""Pictures of attention: the image, query points, and where each attends (Wang et al., Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from nlsurgery.viz.capture import AttentionRows, capture_attention, grid_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: How many of the strongest keys get an arrow, as in the paper's figure at most 20.
NUM_ARROWS = 12
#: Keys weaker than this share of the strongest get no arrow.
ARROW_FLOOR = 0.15

#: Pictures whose long side has fewer pixels are scaled up to it.
SMALLEST_DISPLAY = 480

QUERY_COLOURS = ("#ff4d6d", "#3ec1f3", "#ffd23f", "#5bd18b", "#c58bff", "#ff924c")
INK, FAINT, PAPER = "#1f2430", "#6b7280", "#ffffff"
#: Sizes in inches: width of a panel, space between two, the heading, and a panel's caption.
PANEL, GAP, HEADER, CAPTION = 2.6, 0.12, 0.45, 0.24


def attention_figure(
    model: nn.Module,
    image: Tensor,
    display: Image.Image,
    points: Sequence[tuple[float, float]] | None,
    path: Path,
) -> list[Path]:
    """Draw where each inserted block attends, one PNG per block that has an attention map.

    Args:
        model: An operated image model.
        image: (1, 3, H, W), normalised.
        display: The same view as a picture, at any size.
        points: (x, y) of each query, relative, in [0, 1]; a 2×2 grid when None.
        path: A folder, or a prefix of the files to write.

    Returns:
        The files written, in the order of the blocks.

    Raises:
        DataError: Not a single image, a video model, or nothing inserted.
    """
    queries = grid_points(2) if points is None else tuple(points)
    return draw_rows(capture_attention(model, image, queries).rows, display, queries, path)


def draw_rows(
    rows: Sequence[AttentionRows],
    display: Image.Image,
    points: Sequence[tuple[float, float]],
    path: Path,
) -> list[Path]:
    """Write one PNG per captured block.

    Args:
        rows: What a forward showed.
        display: The view to draw on.
        points: The query points that ``rows`` was captured for.
        path: A folder, or a prefix of the files to write.

    Returns:
        The files written.
    """
    written = []
    for item in rows:
        target = path / f"{item.fqn}.png" if path.is_dir() else Path(f"{path}-{item.fqn}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        block_figure(item, display, points).savefig(target, dpi=150, facecolor=PAPER)
        written.append(target)
    return written


def block_figure(
    rows: AttentionRows, display: Image.Image, points: Sequence[tuple[float, float]]
) -> Figure:
    """Lay out one block's figure: the image with all query points, then one panel per query."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    display = _enlarged(display)
    num_panels = len(points) + 1
    columns = num_panels if num_panels <= 5 else math.ceil(math.sqrt(num_panels))
    lines = math.ceil(num_panels / columns)
    panel_height = PANEL * display.height / display.width
    width = columns * (PANEL + GAP) + GAP
    height = HEADER + lines * (panel_height + CAPTION) + GAP
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    _title(figure, rows)
    for panel in range(num_panels):
        line, column = divmod(panel, columns)
        left = GAP + column * (PANEL + GAP)
        bottom = height - HEADER - (line + 1) * (panel_height + CAPTION)
        ax = figure.add_axes((left / width, bottom / height, PANEL / width, panel_height / height))
        if panel == 0:
            _draw_image(ax, display, points)
        else:
            _draw_query(ax, display, points[panel - 1], rows, panel - 1)
    return figure


def _enlarged(display: Image.Image) -> Image.Image:
    """Scale a small picture up, so that the heat map over it is smooth."""
    zoom = SMALLEST_DISPLAY / max(display.size)
    if zoom <= 1:
        return display
    width, height = (max(1, round(side * zoom)) for side in display.size)
    return display.resize((width, height), Image.Resampling.BICUBIC)


def _title(figure: Figure, rows: AttentionRows) -> None:
    width, height = figure.get_size_inches()
    left, top = GAP / width, 1 - 0.1 / height
    queries, keys = (f"{high}×{wide}" for high, wide in (rows.query_size, rows.key_size))
    details = f"{rows.type}: {queries} queries, {keys} keys"
    figure.text(left, top, rows.fqn, size=10, weight="bold", color=INK, va="top")
    figure.text(left, top - 0.2 / height, details, size=8, color=FAINT, va="top")


def _draw_image(ax: Axes, display: Image.Image, points: Sequence[tuple[float, float]]) -> None:
    ax.imshow(np.asarray(display), extent=(0, 1, 1, 0), aspect="auto")
    for index, point in enumerate(points):
        _mark(ax, point, index, label=len(points) > 1)
    _frame(ax, "queries" if len(points) > 1 else "query")


def _draw_query(
    ax: Axes, display: Image.Image, point: tuple[float, float], rows: AttentionRows, index: int
) -> None:
    weights: NDArray[np.float32] = rows.weights[index].numpy()
    ax.imshow(_heat_map(display, rows, weights), extent=(0, 1, 1, 0), aspect="auto")
    _draw_arrows(ax, point, rows, weights, index)
    _mark(ax, point, index, label=len(rows.weights) > 1)
    _frame(ax, _caption(weights))


def _heat_map(
    display: Image.Image, rows: AttentionRows, weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The picture, dimmed, with the weights glowing over it: (H, W, 3) in [0, 1].

    Negative weights (``dot_product`` has them) glow blue.
    """
    from matplotlib import colormaps

    bound = float(np.abs(weights).max()) or 1.0
    _, right, bottom, _ = _key_extent(rows)
    covered = (round(right * display.width), round(bottom * display.height))
    smooth = Image.fromarray(weights / bound).resize(covered, Image.Resampling.BICUBIC)
    heat = np.zeros((display.height, display.width), dtype=np.float32)
    # Bicubic curves overshoot; the weights' own range is kept.
    lowest = min(0.0, float(weights.min()) / bound)
    heat[: covered[1], : covered[0]] = np.clip(np.asarray(smooth), lowest, 1.0)
    colour = np.asarray(display, dtype=np.float32) / 255
    grey = np.asarray(display.convert("L"), dtype=np.float32)[..., None] / 255
    dimmed = 0.6 * (0.75 * grey + 0.25 * colour)
    glow = colormaps["inferno"](0.25 + 0.75 * np.clip(heat, 0, 1))[..., :3]
    cold = colormaps["GnBu_r"](0.3 + 0.4 * np.clip(-heat, 0, 1))[..., :3]
    glow = np.where(heat[..., None] < 0, cold, glow)
    alpha = 0.85 * np.sqrt(np.abs(heat))[..., None]
    blended: NDArray[np.float32] = (1 - alpha) * dimmed + alpha * glow
    return blended


def _key_extent(rows: AttentionRows) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of the keys' grid; odd sizes leave a margin after sub-sampling."""
    right = rows.key_size[1] * rows.key_stride[1] / rows.query_size[1]
    bottom = rows.key_size[0] * rows.key_stride[0] / rows.query_size[0]
    return 0.0, right, bottom, 0.0


def strongest_keys(
    weights: NDArray[np.float32], *, limit: int = NUM_ARROWS, floor: float = ARROW_FLOOR
) -> list[tuple[int, int]]:
    """The keys a query attends to most.

    Args:
        weights: (H', W').
        limit: How many at most.
        floor: Leave out keys below this share of the strongest.

    Returns:
        (row, column) of each, the strongest first.
    """
    flat = weights.flatten()
    order = np.argsort(-flat, kind="stable")[:limit]
    top = float(flat[order[0]])
    kept = [int(key) for key in order if flat[key] > 0 and flat[key] >= floor * top]
    return [divmod(key, weights.shape[1]) for key in kept]


def _draw_arrows(
    ax: Axes,
    point: tuple[float, float],
    rows: AttentionRows,
    weights: NDArray[np.float32],
    index: int,
) -> None:
    _, right, bottom, _ = _key_extent(rows)
    top = float(weights.max())
    for row, column in strongest_keys(weights):
        target = (
            (column + 0.5) / rows.key_size[1] * right,
            (row + 0.5) / rows.key_size[0] * bottom,
        )
        if math.dist(target, point) < 0.5 / max(rows.query_size):
            continue
        share = float(weights[row, column]) / top
        ax.annotate(
            "",
            xy=target,
            xytext=point,
            arrowprops={
                "arrowstyle": f"-|>,head_width={0.12 + 0.13 * share},head_length=0.35",
                "color": _colour(index),
                "linewidth": 0.5 + 1.3 * share,
                "alpha": 0.45 + 0.55 * share,
                "shrinkA": 3,
                "shrinkB": 0,
                "connectionstyle": "arc3,rad=0.12",
            },
        )


def _mark(ax: Axes, point: tuple[float, float], index: int, *, label: bool) -> None:
    ax.plot(
        *point,
        marker="o",
        markersize=10 if label else 7,
        color=_colour(index),
        markeredgecolor="white",
        markeredgewidth=1.2,
        clip_on=False,
        zorder=5,
    )
    if label:
        ax.text(
            *point,
            str(index + 1),
            color=INK,
            zorder=6,
            ha="center",
            va="center_baseline",
            size=6.5,
            weight="bold",
        )


def _frame(ax: Axes, caption: str) -> None:
    ax.set_xlim(0, 1)
    ax.set_ylim(1, 0)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(caption, size=8, color=FAINT, pad=3)


def _caption(weights: NDArray[np.float32]) -> str:
    """How far from uniform the attention is, so that a flat map does not look like a sharp one."""
    if weights.min() < 0:
        return f"weights {weights.min():.2g} to {weights.max():.2g}"
    total = float(weights.sum())
    if total == 0:
        return "attends nowhere"
    return f"strongest of {weights.size} keys: {weights.max() / total:.1%}"


def _colour(index: int) -> str:
    return QUERY_COLOURS[index % len(QUERY_COLOURS)]
