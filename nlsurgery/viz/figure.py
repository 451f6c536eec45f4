"""Pictures of attention: the image, query points, and where each attends (Wang et al., Fig. 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from nlsurgery.viz.capture import AttentionRows, capture_attention, grid_points
from nlsurgery.viz.images import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: How many of the strongest keys get an arrow, as in the paper's figure at most 20.
NUM_ARROWS = 12
#: Keys weaker than this share of the strongest get no arrow.
ARROW_FLOOR = 0.15

#: How many frames of a clip are shown.
MOST_FRAMES = 8

#: Pictures whose long side has fewer pixels are scaled up to it.
SMALLEST_DISPLAY = 480

QUERY_COLOURS = ("#ff4d6d", "#3ec1f3", "#ffd23f", "#5bd18b", "#c58bff", "#ff924c")
INK, FAINT, PAPER = "#1f2430", "#6b7280", "#ffffff"
#: Sizes in inches: width of a panel, space between two, the heading, and a panel's caption.
PANEL, GAP, HEADER, CAPTION = 2.6, 0.12, 0.45, 0.24


def attention_figure(
    model: nn.Module,
    image: Tensor,
    display: Picture,
    points: Sequence[tuple[float, ...]] | None,
    path: Path,
) -> list[Path]:
    """Draw where each inserted block attends, one PNG per block that has an attention map.

    Args:
        model: An operated model.
        image: (1, 3, H, W), or a clip (1, 3, T, H, W), normalised.
        display: The same view as a picture, at any size; of a clip, its T frames.
        points: (x, y) of each query, relative, in [0, 1], or (x, y, t) in a clip; a 2×2 grid when None.
        path: A folder, or a prefix of the files to write.

    Returns:
        The files written, in the order of the blocks.

    Raises:
        DataError: Not a single image or clip, not what the model takes, or nothing inserted.
    """
    queries = grid_points(2) if points is None else tuple(points)
    return draw_rows(capture_attention(model, image, queries).rows, display, queries, path)


def draw_rows(
    rows: Sequence[AttentionRows],
    display: Picture,
    points: Sequence[tuple[float, ...]],
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
    rows: AttentionRows, display: Picture, points: Sequence[tuple[float, ...]]
) -> Figure:
    """Lay out one block's figure.

    Of an image: the image with all query points, then one panel per query. Of a clip: a line of
    frames per query, at most :data:`MOST_FRAMES` of those that keys lie in.
    """
    if isinstance(display, tuple):
        return _clip_figure(rows, [_enlarged(frame) for frame in display], points)
    display = _enlarged(display)
    num_panels = len(points) + 1
    columns = num_panels if num_panels <= 5 else math.ceil(math.sqrt(num_panels))
    lines = math.ceil(num_panels / columns)
    figure, panels = _panels(rows, display, lines, columns)
    _draw_image(panels[0], display, points)
    for index, point in enumerate(points):
        _draw_query(panels[index + 1], display, point, rows, index)
    for unused in panels[num_panels:]:
        unused.remove()
    return figure


def _clip_figure(
    rows: AttentionRows, frames: Sequence[Image.Image], points: Sequence[tuple[float, ...]]
) -> Figure:
    num_times = rows.key_size[0]
    times = [round(step) for step in np.linspace(0, num_times - 1, min(num_times, MOST_FRAMES))]
    shown = [int((time + 0.5) / num_times * len(frames)) for time in times]
    figure, panels = _panels(rows, frames[0], len(points), len(times))
    for index, point in enumerate(points):
        line = panels[index * len(times) : (index + 1) * len(times)]
        weights: NDArray[np.float32] = rows.weights[index].numpy()
        bound = float(np.abs(weights).max()) or 1.0
        total = float(weights.sum()) if weights.min() >= 0 else 0.0
        for ax, time, frame in zip(line, times, shown, strict=True):
            heat = _heat_map(frames[frame], rows, weights[time] / bound)
            ax.imshow(heat, extent=(0, 1, 1, 0), aspect="auto")
            share = f": {weights[time].sum() / total:.1%}" if total else ""
            _frame(ax, f"frame {frame + 1}{share}")
        at = rows.queries[index][0] / rows.query_size[0] * num_times
        nearest = min(range(len(times)), key=lambda place: abs(times[place] - at))
        _draw_arrows_through_time(figure, line, times, nearest, point, rows, weights, index)
        _mark(line[nearest], point[:2], index, label=len(points) > 1)
    return figure


def _panels(
    rows: AttentionRows, display: Image.Image, lines: int, columns: int
) -> tuple[Figure, list[Axes]]:
    """A titled figure with a grid of panels in the picture's proportions, line by line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panel_height = PANEL * display.height / display.width
    width = columns * (PANEL + GAP) + GAP
    height = HEADER + lines * (panel_height + CAPTION) + GAP
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    _title(figure, rows)
    panels = []
    for panel in range(lines * columns):
        line, column = divmod(panel, columns)
        left = GAP + column * (PANEL + GAP)
        bottom = height - HEADER - (line + 1) * (panel_height + CAPTION)
        box = (left / width, bottom / height, PANEL / width, panel_height / height)
        panels.append(figure.add_axes(box))
    return figure, panels


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
    queries, keys = ("×".join(map(str, size)) for size in (rows.query_size, rows.key_size))
    details = f"{rows.type}: {queries} queries, {keys} keys"
    figure.text(left, top, rows.fqn, size=10, weight="bold", color=INK, va="top")
    figure.text(left, top - 0.2 / height, details, size=8, color=FAINT, va="top")


def _draw_image(ax: Axes, display: Image.Image, points: Sequence[tuple[float, ...]]) -> None:
    ax.imshow(np.asarray(display), extent=(0, 1, 1, 0), aspect="auto")
    for index, point in enumerate(points):
        _mark(ax, point, index, label=len(points) > 1)
    _frame(ax, "queries" if len(points) > 1 else "query")


def _draw_query(
    ax: Axes, display: Image.Image, point: tuple[float, ...], rows: AttentionRows, index: int
) -> None:
    weights: NDArray[np.float32] = rows.weights[index].numpy()
    bound = float(np.abs(weights).max()) or 1.0
    ax.imshow(_heat_map(display, rows, weights / bound), extent=(0, 1, 1, 0), aspect="auto")
    _draw_arrows(ax, point, rows, weights, index)
    _mark(ax, point, index, label=len(rows.weights) > 1)
    _frame(ax, _caption(weights))


def _heat_map(
    display: Image.Image, rows: AttentionRows, weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The picture, dimmed, with the weights glowing over it: (H, W, 3) in [0, 1].

    Negative weights (``dot_product`` has them) glow blue.

    Args:
        display: The picture.
        rows: Tell how much of it the keys cover.
        weights: (H', W') in [-1, 1].
    """
    from matplotlib import colormaps

    right, bottom = _key_extent(rows)
    covered = (round(right * display.width), round(bottom * display.height))
    smooth = Image.fromarray(weights).resize(covered, Image.Resampling.BICUBIC)
    heat = np.zeros((display.height, display.width), dtype=np.float32)
    # Bicubic curves overshoot; the weights' own range is kept.
    lowest = min(0.0, float(weights.min()))
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


def _key_extent(rows: AttentionRows) -> tuple[float, float]:
    """Right and bottom of the keys' grid; odd sizes leave a margin after sub-sampling."""
    bottom, right = (
        rows.key_size[axis] * rows.key_stride[axis] / rows.query_size[axis] for axis in (-2, -1)
    )
    return right, bottom


def strongest_keys(
    weights: NDArray[np.float32], *, limit: int = NUM_ARROWS, floor: float = ARROW_FLOOR
) -> list[tuple[int, ...]]:
    """The keys a query attends to most.

    Args:
        weights: (H', W') or (T', H', W').
        limit: How many at most.
        floor: Leave out keys below this share of the strongest.

    Returns:
        (row, column), or (time, row, column), of each, the strongest first.
    """
    flat = weights.flatten()
    order = np.argsort(-flat, kind="stable")[:limit]
    top = float(flat[order[0]])
    kept = [int(key) for key in order if flat[key] > 0 and flat[key] >= floor * top]
    return [tuple(map(int, np.unravel_index(key, weights.shape))) for key in kept]


def _draw_arrows(
    ax: Axes,
    point: tuple[float, ...],
    rows: AttentionRows,
    weights: NDArray[np.float32],
    index: int,
) -> None:
    for key in strongest_keys(weights):
        target = _centre(rows, key)
        if math.dist(target, point[:2]) < 0.5 / max(rows.query_size):
            continue
        style = _arrow(float(weights[key] / weights.max()), index)
        ax.annotate("", xy=target, xytext=(point[0], point[1]), arrowprops=style)


def _draw_arrows_through_time(
    figure: Figure,
    line: Sequence[Axes],
    times: Sequence[int],
    start: int,
    point: tuple[float, ...],
    rows: AttentionRows,
    weights: NDArray[np.float32],
    index: int,
) -> None:
    """Arrows from the query's frame to the strongest keys in the frames of its line."""
    from matplotlib.patches import ConnectionPatch

    for key in strongest_keys(weights):
        target = _centre(rows, key)
        near = math.dist(target, point[:2]) < 0.5 / max(rows.query_size[1:])
        if key[0] not in times or (near and times[start] == key[0]):
            continue
        figure.add_artist(
            ConnectionPatch(
                xyA=(point[0], point[1]),
                xyB=target,
                coordsA="data",
                coordsB="data",
                axesA=line[start],
                axesB=line[times.index(key[0])],
                **_arrow(float(weights[key] / weights.max()), index),
            )
        )


def _centre(rows: AttentionRows, key: tuple[int, ...]) -> tuple[float, float]:
    """(x, y) of a key's centre, relative to the picture."""
    right, bottom = _key_extent(rows)
    row, column = key[-2:]
    return (column + 0.5) / rows.key_size[-1] * right, (row + 0.5) / rows.key_size[-2] * bottom


def _arrow(share: float, index: int) -> dict[str, Any]:
    """How an arrow looks to a key of this share of the strongest one's weight."""
    return {
        "arrowstyle": f"-|>,head_width={0.12 + 0.13 * share},head_length=0.35",
        "color": _colour(index),
        "linewidth": 0.5 + 1.3 * share,
        "alpha": 0.45 + 0.55 * share,
        "shrinkA": 3,
        "shrinkB": 0,
        "connectionstyle": "arc3,rad=0.12",
    }


def _mark(ax: Axes, point: tuple[float, ...], index: int, *, label: bool) -> None:
    ax.plot(
        *point[:2],
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
            point[0],
            point[1],
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
