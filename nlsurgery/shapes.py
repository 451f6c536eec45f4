"""Which axis is what: layout, channels, size and stride of a feature map, read off its shapes.

A second probe at twice the height and three times the width settles it: an axis that stays is the
channels (or the frames), one that doubles the height, one that trebles the width, and one that grows
sixfold the tokens. Models that take one size only are read off that size and the model's own hints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nlsurgery.blocks.layout import Kind, Layout

#: The most prefix tokens (class, distillation, register) looked for when they cannot be measured.
_MAX_PREFIX = 17

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature map.

    Attributes:
        layout: Order of its axes, prefix tokens and token grid.
        num_chs: Channels.
        feature_size: (H, W), or (T, H, W).
        reduction: Input height over its height.
    """

    layout: Layout
    num_chs: int
    feature_size: tuple[int, ...]
    reduction: int


@dataclass(frozen=True, slots=True)
class Hints:
    """What a model says of itself, used only where shapes leave a choice.

    Attributes:
        num_chs: Channel counts the model declares.
        num_prefix_tokens: The model's own count of prefix tokens, or None.
        sequence: Whether its tokens are known not to stand row by row.
    """

    num_chs: frozenset[int] = frozenset()
    num_prefix_tokens: int | None = None
    sequence: bool = False


def read_feature(
    first: Shape,
    inputs: Shape,
    second: Shape | None,
    inputs2: Shape | None,
    sizes: Shape | None = None,
    hints: Hints = Hints(),
) -> Feature | None:
    """Read layout, channels, size and stride of a feature map off its shapes.

    Args:
        first: Its shape in the first probe, batch first.
        inputs: The input's shape there, (B, C, H, W) or (B, C, T, H, W).
        second: Its shape in the second probe, or None.
        inputs2: The input's shape there, or None.
        sizes: (H, W) or (T, H, W) that the module returned beside it, if any.
        hints: What the model says of itself.

    Returns:
        None when it is no feature map with spatial axes, or its axes cannot be told apart.
    """
    feature = _read(first, inputs, second, inputs2, sizes, hints)
    if feature is not None and hints.sequence and feature.layout.kind == "NLC":
        layout = Layout("NLC", num_prefix_tokens=feature.layout.num_prefix_tokens)
        length = (math.prod(feature.feature_size),)
        return Feature(layout, feature.num_chs, length, feature.reduction)
    return feature


def _read(
    first: Shape,
    inputs: Shape,
    second: Shape | None,
    inputs2: Shape | None,
    sizes: Shape | None,
    hints: Hints,
) -> Feature | None:
    if len(first) not in (3, 4, 5) or len(inputs) < 4 or first[0] != inputs[0] or min(first) < 1:
        return None
    if second is not None and inputs2 is not None and len(second) == len(first):
        return _from_two(first, inputs, second, inputs2, sizes, hints)
    return _from_one(first, inputs, sizes, hints)


def _from_two(
    first: Shape, inputs: Shape, second: Shape, inputs2: Shape, sizes: Shape | None, hints: Hints
) -> Feature | None:
    grows = "".join(_growth(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    kinds: dict[str, Kind] = {
        "1hw": "NCHW",
        "hw1": "NHWC",
        "1thw": "NCTHW",
        "11hw": "NCTHW",
        "1hw1": "NTHWC",
    }
    if grows in kinds and len(kinds[grows]) <= len(inputs):
        kind = kinds[grows]
        size, channels = _split(first, kind)
        later, _ = _split(second, kind)
        reduction = _reduction(size[-2], inputs[-2], later[-2], inputs2[-2])
        return Feature(Layout(kind), channels, size, reduction)
    if grows in ("n1", "1n"):
        axis = 1 if grows == "n1" else 2
        grid = _token_grids(first[axis], inputs, second[axis], inputs2, sizes)
        return None if grid is None else _tokens(first, axis, *grid)
    return None


def _growth(first: int, second: int) -> str:
    """Name how an axis grew: 1 (not), h (twice), w (three times), n (six times), or ? (else)."""
    if first == second:
        return "1"
    factors = {"h": 2.0, "w": 3.0, "n": 6.0}
    name, factor = min(factors.items(), key=lambda item: abs(math.log(second / first / item[1])))
    slack = 0.35 if first < 16 else 0.15
    return name if abs(math.log(second / first / factor)) < slack else "?"


def _split(shape: Shape, kind: str) -> tuple[Shape, int]:
    """Spatial sizes and channels of a shape of a known layout without tokens."""
    if kind.endswith("C"):
        return shape[1:-1], shape[-1]
    return shape[2:], shape[1]


def _reduction(size: int, inputs: int, later: int | None = None, inputs2: int | None = None) -> int:
    """The stride: a power of two where one explains the sizes, else the slope between two sizes."""
    pairs = [(size, inputs)]
    if later is not None and inputs2 is not None:
        pairs.append((later, inputs2))
    power: int = 2 ** max(0, round(math.log2(inputs / size)))
    for stride in (power, 2 * power, max(1, power // 2)):
        if all(out in (whole // stride, -(-whole // stride)) for out, whole in pairs):
            return stride
    if later is not None and inputs2 is not None and later > size:
        slope = (inputs2 - inputs) / (later - size)
        near: int = 2 ** max(0, round(math.log2(slope)))
        return near if abs(slope / near - 1) < 0.06 else max(1, round(slope))
    ratio = inputs / size
    return power if abs(ratio / power - 1) < 0.1 else max(1, round(ratio))


def _token_grids(
    length: int, inputs: Shape, length2: int, inputs2: Shape, sizes: Shape | None
) -> tuple[int, Shape, int] | None:
    """Solve P + H·W = L at both sizes. Returns (prefix tokens, grid, reduction)."""
    if sizes is not None and 0 <= length - math.prod(sizes) < _MAX_PREFIX:
        reduction = _reduction(sizes[-2], inputs[-2])
        return length - math.prod(sizes), sizes, reduction
    measured, rest = divmod(6 * length - length2, 5)
    candidates = [measured] if rest == 0 and 0 <= measured < length else []
    candidates += [p for p in range(_MAX_PREFIX) if p not in candidates]
    for prefix in candidates:
        for grid in _grids(length - prefix, inputs):
            later = [
                g
                for g in _grids(length2 - prefix, inputs2)
                if _growth(grid[-2], g[-2]) in "h" and _growth(grid[-1], g[-1]) in "w"
            ]
            if later:
                return prefix, grid, _reduction(grid[-2], inputs[-2], later[0][-2], inputs2[-2])
    return None


def _grids(num_tokens: int, inputs: Shape) -> Iterator[Shape]:
    """Yield the (H, W) or (T, H, W) grids of a token count with the input's aspect, finest in T first."""
    frames = range(inputs[2], 0, -1) if len(inputs) == 5 else (1,)
    for depth in frames:
        if num_tokens <= 0 or num_tokens % depth or (len(inputs) == 5 and inputs[2] % depth):
            continue
        area = num_tokens // depth
        ideal = math.sqrt(area * inputs[-2] / inputs[-1])
        for height in dict.fromkeys((round(ideal), math.floor(ideal), math.ceil(ideal))):
            if height < 1 or area % height:
                continue
            width = area // height
            if abs(height / inputs[-2] * inputs[-1] / width - 1) > 1.0 / min(height, width) + 0.02:
                continue
            yield (depth, height, width) if len(inputs) == 5 else (height, width)


def _tokens(first: Shape, axis: int, prefix: int, grid: Shape, reduction: int) -> Feature:
    if axis == 2:
        return Feature(Layout("NCL"), first[1], grid, reduction)
    layout = Layout("NLC", num_prefix_tokens=prefix, grid=grid)
    return Feature(layout, first[3 - axis], grid, reduction)


def _from_one(first: Shape, inputs: Shape, sizes: Shape | None, hints: Hints) -> Feature | None:
    if len(first) == 3:
        return _tokens_from_one(first, inputs, sizes, hints)
    spatial = len(inputs) - 2
    if len(first) != spatial + 2:
        return None
    fits: list[tuple[Kind, Shape, int, float]] = []
    kinds: tuple[Kind, ...] = ("NCHW", "NHWC") if spatial == 2 else ("NCTHW", "NTHWC")
    for kind in kinds:
        size, channels = _split(first, kind)
        aspect = size[-2] * inputs[-1] / (size[-1] * inputs[-2])
        if max(size[-2:]) <= max(inputs[-2:]) and _same_stride(size, inputs):
            fits.append((kind, size, channels, abs(aspect - 1)))
    hinted = [fit for fit in fits if fit[2] in hints.num_chs]
    exact = [fit for fit in fits if fit[3] == 0]
    chosen = hinted if len(hinted) == 1 else exact if len(exact) == 1 else fits
    if len(chosen) != 1 or math.prod(chosen[0][1][-2:]) == 1:
        return None
    kind, size, channels, _ = chosen[0]
    return Feature(Layout(kind), channels, size, _reduction(size[-2], inputs[-2]))


def _same_stride(size: Shape, inputs: Shape) -> bool:
    """Whether one stride explains height and width, each rounded up or down."""
    low = max(inputs[-2] / (size[-2] + 1), inputs[-1] / (size[-1] + 1))
    high = min(
        inputs[-2] / max(size[-2] - 1, 0.5),
        inputs[-1] / max(size[-1] - 1, 0.5),
    )
    return low < high


def _tokens_from_one(
    first: Shape, inputs: Shape, sizes: Shape | None, hints: Hints
) -> Feature | None:
    declared_last = first[2] in hints.num_chs
    channels_first = first[1] in hints.num_chs and not declared_last and first[1] > 1
    axes: tuple[int, ...] = (2,) if channels_first else (1,)
    squares = [any(True for _ in _grids(first[axis], inputs)) for axis in (1, 2)]
    if sizes is None and not declared_last and not channels_first and all(squares):
        return None  # both axes could be the grid, and the model says nothing
    known = () if hints.num_prefix_tokens is None else (hints.num_prefix_tokens,)
    for axis in axes:
        length = first[axis]
        if sizes is not None and 0 <= length - math.prod(sizes) < _MAX_PREFIX:
            reduction = _reduction(sizes[-2], inputs[-2])
            return _tokens(first, axis, length - math.prod(sizes), sizes, reduction)
        for prefix in dict.fromkeys((*known, 0, 1, 2, 5)):
            if length - prefix < 2:
                continue
            for grid in _grids(length - prefix, inputs):
                reduction = _reduction(grid[-2], inputs[-2])
                return _tokens(first, axis, prefix, grid, reduction)
    return None
