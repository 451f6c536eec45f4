"""What blocks need to know of shapes: 1×1 convolutions, key pooling, tokens, input checks.

Functions here decide by shape, so they are opaque to ``torch.fx`` (``torch.fx.wrap``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlsurgery.errors import BlockError

CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
#: The memory format with channels last, by a map's number of dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def takes_plain_operators() -> bool:
    """Whether ``torch.jit.trace`` or ONNX export records operators, or ``torch.func`` transforms them.

    An autograd function of ours could not be recorded or transformed.
    """
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return _is_watched()


def is_eager() -> bool:
    """Whether operators only run: nothing is compiled, recorded or transformed, and tensors have values."""
    if torch.compiler.is_compiling() or _is_watched():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None  # type: ignore[attr-defined]


def _is_watched() -> bool:
    # What torch.jit.is_tracing() asks, in a fifth of its time.
    recorded = torch._C._is_tracing()
    return recorded or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined, no-any-return]


def is_compiled() -> bool:
    """Whether a graph is compiled, not exported: one for other sizes is made where they ask for it."""
    if not torch.compiler.is_compiling() or takes_plain_operators():
        return False
    # Before torch 2.7 the two cannot be told apart.
    return hasattr(torch.compiler, "is_exporting") and not torch.compiler.is_exporting()


def has_sizes() -> bool:
    """Whether a choice by size may be made: operators run, or a graph is compiled, not exported."""
    return is_compiled() if torch.compiler.is_compiling() else is_eager()


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform runs, outside a graph."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for a batch of them (``is_grads_batched``), which few operators take."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)  # type: ignore[attr-defined, no-any-return]


def pointwise(in_channels: int, out_channels: int, dims: int, *, bias: bool = True) -> nn.Module:
    """A 1×1 convolution in ``dims`` spatial dimensions.

    Raises:
        BlockError: A channel count below 1, or ``dims`` not 1, 2 or 3.
    """
    if dims not in CONVS:
        raise BlockError(f"dims must be 1, 2 or 3, got {dims!r}")
    for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
        if not isinstance(count, int) or count < 1:
            raise BlockError(f"{name} must be a positive int, got {count!r}")
    return CONVS[dims](in_channels, out_channels, kernel_size=1, bias=bias)


def reduced(in_channels: int, reduction: float, *, name: str = "reduction") -> int:
    """Channels after a reduction: ``in_channels // reduction``, at least 1.

    Raises:
        BlockError: ``reduction`` is not a positive number.
    """
    if isinstance(reduction, bool) or not reduction > 0:
        raise BlockError(f"{name} must be a positive number, got {reduction!r}")
    return max(1, int(in_channels // reduction))


def choice(value: str, allowed: Sequence[str], *, name: str) -> str:
    """Check an option that names one of several forms.

    Raises:
        BlockError: ``value`` is none of ``allowed``.
    """
    if value not in allowed:
        raise BlockError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


@torch.fx.wrap
def checked_input(x: Tensor, in_channels: int, dims: int) -> Tensor:
    """Return ``x`` if it is (B, in_channels, *spatial) with ``dims`` spatial dimensions.

    Raises:
        BlockError: It is not; the message gives both shapes.
    """
    if x.dim() != dims + 2 or x.shape[1] != in_channels:
        axes = ("L",), ("H", "W"), ("T", "H", "W")
        expected = ", ".join(("B", str(in_channels), *axes[dims - 1]))
        raise BlockError(
            f"the block expects ({expected}), got {tuple(x.shape)}; "
            "channels come first and the batch dimension cannot be left out"
        )
    return x


def pool_sizes(sub_sample: bool | Sequence[int], dims: int) -> tuple[int, ...] | None:
    """Positions that a key stands for along each axis: 2 over space, 1 over time, unless told.

    Args:
        sub_sample: Whether keys are pooled, or by how many along each axis.
        dims: Spatial dimensions.

    Returns:
        One size an axis, ``None`` where nothing is pooled.

    Raises:
        BlockError: Sizes that are not ``dims`` positive numbers.
    """
    if isinstance(sub_sample, bool):
        return (1, 2, 2)[-dims:] if sub_sample else None
    sizes = tuple(sub_sample) if isinstance(sub_sample, Sequence) else ()
    if len(sizes) != dims or not all(type(size) is int and size > 0 for size in sizes):
        raise BlockError(
            f"sub_sample must be true, false or {dims} positive sizes (as {[1, 2, 2][-dims:]}), got "
            f"{sub_sample!r}"
        )
    return sizes if max(sizes) > 1 else None


def pool_option(sizes: Sequence[int] | None, dims: int) -> bool | list[int]:
    """How a recipe says :func:`pool_sizes`, in one way: ``True`` for the published sizes."""
    if sizes is None or tuple(sizes) == pool_sizes(True, dims):
        return sizes is not None
    return list(sizes)


def num_keys(spatial: Sequence[int], pool: Sequence[int] | None) -> int:
    """M of a map: positions that pooling leaves, where sizes round down and those below the cell's are 1."""
    if pool is None:
        return math.prod(spatial)
    return math.prod([n // step if n >= step else 1 for n, step in zip(spatial, pool, strict=True)])


@torch.fx.wrap
def pool_keys(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Max-pool a map.

    An axis shorter than its size is pooled as a whole, so that the result is never empty.

    Args:
        x: (B, C, L), (B, C, H, W) or (B, C, T, H, W).
        sizes: Of the cells, along each axis.

    Returns:
        The pooled tensor, of :func:`num_keys` positions.
    """
    kernel = [step if size >= step else size for size, step in zip(x.shape[2:], sizes, strict=True)]
    if len(kernel) == 1:
        return F.max_pool1d(x, kernel)
    if len(kernel) == 2:
        return F.max_pool2d(x, kernel)
    return to_dtype_of(F.max_pool3d(x, kernel), x)


def to_dtype_of(pooled: Tensor, x: Tensor) -> Tensor:
    """``pooled`` in the dtype of ``x``: under autocast torch's CPU pools in 3-D give float32."""
    return pooled if pooled.dtype == x.dtype else pooled.to(x.dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions of ``x`` compute: autocast's, else its own."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


@torch.fx.wrap
def to_tokens(x: Tensor) -> Tensor:
    """(B, C, *spatial) to (B, N, C), a view for contiguous and channels-last tensors."""
    if _is_channels_last(x, 1):
        return x.movedim(1, -1).flatten(1, -2)
    return x.flatten(2).transpose(1, 2)


@torch.fx.wrap
def to_map(tokens: Tensor, spatial: Sequence[int]) -> Tensor:
    """(B, N, C) to (B, C, *spatial), a view where possible."""
    batch, _, channels = tokens.shape
    if _is_channels_last(tokens, 2):
        return tokens.reshape(batch, *spatial, channels).movedim(-1, 1)
    return tokens.transpose(1, 2).reshape(batch, channels, *spatial)


def _is_channels_last(x: Tensor, channels: int) -> bool:
    # Flattening (1, C, H, W) in the other order loses the stride of the batch, and with it the
    # memory format by which torch chooses its convolutions, forward and backward.
    return is_eager() and x.stride(channels) == 1
