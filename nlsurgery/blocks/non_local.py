"""The non-local block in its four modes (Wang et al., CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from nlsurgery.blocks.affinity import (
    MODES,
    SOFTMAX_MODES,
    dot_product_map,
    logit_scale,
    softmax_map,
)
from nlsurgery.blocks.affinity_concat import scalar_sum_map
from nlsurgery.blocks.attend import (
    attend,
    laid_out,
    logit_part,
    logits_and_values,
)
from nlsurgery.blocks.choose import checked_implementation, choose_implementation
from nlsurgery.blocks.few import are_few, few_non_local
from nlsurgery.blocks.geometry import (
    checked_input,
    choice,
    num_keys,
    pointwise,
    pool_keys,
    pool_option,
    pool_sizes,
    reduced,
    to_tokens,
)
from nlsurgery.blocks.norms import build_norm
from nlsurgery.blocks.registration import register
from nlsurgery.blocks.residual import (
    add_projected,
    matrix_of,
    project,
    project_scaled,
    project_together,
)
from nlsurgery.blocks.windows import from_windows, to_windows, windowed_map
from nlsurgery.errors import BlockError

for _name in ("add_projected", "attend", "checked_input", "dot_product_map", "from_windows"):
    torch.fx.wrap(_name)
for _name in (
    "laid_out",
    "logit_part",
    "logits_and_values",
    "matrix_of",
    "pool_keys",
    "project",
    "project_scaled",
    "project_together",
    "scalar_sum_map",
):
    torch.fx.wrap(_name)
for _name in ("softmax_map", "to_tokens", "to_windows"):
    torch.fx.wrap(_name)

Mode = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
PoolOrder = Literal["after_conv", "before_conv"]
Norm = Literal["bn", "ln", "gn", "none"]
Implementation = Literal["auto", "explicit", "fused", "chunked", "reassociated", "sorted"]
POOL_ORDERS = ("after_conv", "before_conv")
#: The modes whose queries and keys are projected.
_PROJECTED = ("embedded_gaussian", "dot_product")


class NonLocal(nn.Module):
    """z = x + W_z y,  y_i = 1/C(x) · Σ_j f(x_i, x_j) g(x_j)  (Eqs. 1 and 6).

    Children: ``theta`` and ``phi`` (absent in ``gaussian``), ``g``, ``concat_project`` (only in
    ``concatenation``: 2C' → 1, always a 2-D kernel), ``out`` (W_z), and the normalisation after
    it under the name of its kind: ``bn``, ``ln`` or ``gn``.

    Differs from the paper: values of the branch that are not finite count as 0, so that a block
    with a zero gate is the identity for every input; a one-value batch is normalised by the
    running statistics (see ``norms.py``).
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        *,
        dims: int = 2,
        mode: str = "embedded_gaussian",
        sub_sample: bool | Sequence[int] = False,
        pool_order: str = "after_conv",
        use_scale: bool = False,
        norm: str = "bn",
        zero_init: bool = True,
        bias: bool = True,
        temporal_window: int | None = None,
        implementation: str = "auto",
    ) -> None:
        """Build the block.

        Args:
            in_channels: C of the host's output.
            inter_channels: C', by default C // 2, at least 1.
            dims: Spatial dimensions of the input: 1, 2 or 3.
            mode: The pairwise function f: ``gaussian``, ``embedded_gaussian``, ``dot_product`` or
                ``concatenation``.
            sub_sample: Max-pool keys and values by 2 over space (1×2×2 in 3-D), or by so many along
                each axis, such as ``[2, 2, 2]``.
            pool_order: Pool ``after_conv`` (φ and g, then the pool) or ``before_conv``.
            use_scale: Divide the logits of the softmax modes by √(head size).
            norm: After ``out``: ``bn``, ``ln`` (over channels), ``gn`` or ``none``.
            zero_init: Start as the identity: the norm's weight and bias, or without a norm those
                of ``out``, are 0.
            bias: Whether the 1×1 convolutions have a bias.
            temporal_window: Of clips: frames attend within windows of so many, which divide T.
            implementation: The exact form that computes y: ``explicit`` for all modes, ``fused``
                and ``chunked`` for the softmax modes, ``reassociated`` for ``dot_product``,
                ``sorted`` for ``concatenation``; ``auto`` chooses by size (``choose.py``).

        Raises:
            BlockError: An option that is not allowed (a ValueError).
        """
        super().__init__()
        choice(mode, MODES, name="mode")
        choice(pool_order, POOL_ORDERS, name="pool_order")
        if use_scale and mode not in SOFTMAX_MODES:
            raise BlockError(
                f"use_scale=True divides the logits of a softmax, and mode={mode!r} has none; "
                f"use it with {' or '.join(SOFTMAX_MODES)}, or leave it out"
            )
        self.implementation = checked_implementation(implementation, mode)
        if inter_channels is None:
            inter_channels = max(1, in_channels // 2)
        self.in_channels, self.inter_channels, self.dims = in_channels, inter_channels, dims
        self.mode, self.pool, self.pool_order = mode, pool_sizes(sub_sample, dims), pool_order
        self.sub_sample = pool_option(self.pool, dims)
        self.temporal_window = _checked_window(temporal_window, dims, self.pool)
        self.use_scale, self.norm_kind, self.zero_init = use_scale, norm, zero_init
        self.scale = logit_scale(in_channels if mode == "gaussian" else inter_channels, use_scale)
        if mode != "gaussian":
            self.theta = pointwise(in_channels, inter_channels, dims, bias=bias)
            self.phi = pointwise(in_channels, inter_channels, dims, bias=bias)
        self.g = pointwise(in_channels, inter_channels, dims, bias=bias)
        if mode == "concatenation":
            self.concat_project = pointwise(2 * inter_channels, 1, 2, bias=False)
        self.out = pointwise(inter_channels, in_channels, dims, bias=bias)
        if (module := build_norm(norm, in_channels)) is not None:
            self.add_module(norm, module)
        self.reset_parameters()

    @property
    def norm(self) -> nn.Module | None:
        """The normalisation after ``out``, ``None`` where there is none."""
        return None if self.norm_kind == "none" else cast(nn.Module, getattr(self, self.norm_kind))

    @property
    def gate(self) -> nn.Parameter:
        """What is zero at init: the norm's weight (C,), or ``out.weight`` without a norm."""
        module = self.norm or self.out
        return cast(nn.Parameter, module.weight)

    def reset_parameters(self) -> None:
        """Restore the init: projections N(0, 0.01²) as published, biases 0, the gate as asked."""
        for name in ("theta", "phi", "g", "concat_project", "out"):
            module = getattr(self, name, None)
            if module is not None:
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if (norm := self.norm) is not None:
            cast(nn.BatchNorm2d, norm).reset_parameters()
        if self.zero_init:
            gated = norm or self.out
            for parameter in gated.parameters(recurse=False):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Add the non-local branch.

        Args:
            x: (B, C, *spatial).

        Returns:
            The same shape, dtype and memory format.

        Raises:
            BlockError: ``x`` has another number of channels or dimensions.
        """
        x = checked_input(x, self.in_channels, self.dims)
        source, frames = x, self.temporal_window
        if frames is not None:
            source = to_windows(x, frames)
        elif self.mode in _PROJECTED and self.implementation == "auto" and self.pool is None:
            z = self._of_few(x) if are_few(x) else None
            if z is not None:
                return z
        source = laid_out(source, self.mode, self._sizes, self.pool, self.implementation)
        q, k, v, scale = self._projections(source)
        y = attend(q, k, v, self.mode, scale, self.implementation)
        if frames is not None:
            y = from_windows(y, x)
        return add_projected(x, y, self.out, self.norm)

    def attention(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The normalised pairwise map f(x_i, x_j) / C(x).

        Args:
            x: (B, C, *spatial).
            queries: (Q,) positions i in 0..N-1 to compute rows for, all N by default.

        Returns:
            (B, N, M), or (B, Q, M), with M = N keys, fewer under ``sub_sample``; rows sum to 1 in
            the softmax modes. float32 for half inputs.
        """
        source = checked_input(x, self.in_channels, self.dims)
        if self.temporal_window is not None:
            return windowed_map(source, self.temporal_window, queries, self._map)
        return self._map(source, queries)

    def _map(self, x: Tensor, queries: Tensor | None) -> Tensor:
        queries_map, keys_map, _, scale = self._projections(x)
        q, k = to_tokens(queries_map), to_tokens(keys_map)
        if queries is not None:
            q = q[:, queries]
        if self.mode == "concatenation":
            return scalar_sum_map(q, k)
        return dot_product_map(q, k) if self.mode == "dot_product" else softmax_map(q, k, scale)

    def chosen_implementation(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> str:
        """The form that computes an input of this shape.

        Args:
            shape: (B, C, *spatial).
            dtype: Of the projections (under autocast, its dtype).
            device: The type of device.
        """
        if self.implementation != "auto":
            return self.implementation
        batch, spatial = shape[0], list(shape[2:])
        if (frames := self.temporal_window) is not None:
            batch, spatial[0] = batch * spatial[0] // frames, frames
        head_size, value_size = self._sizes
        return choose_implementation(
            self.mode,
            num_queries=math.prod(spatial),
            num_keys=num_keys(spatial, self.pool),
            head_size=head_size,
            value_size=value_size,
            batch=batch,
            dtype=dtype,
            device_type=device,
        )

    @property
    def _sizes(self) -> tuple[int, int]:
        head = self.in_channels if self.mode == "gaussian" else self.inter_channels
        return head, self.inter_channels

    def _of_few(self, x: Tensor) -> Tensor | None:
        projections = self.theta, self.phi, self.g
        return few_non_local(x, projections, self.out, self.norm, self.mode, self.scale)

    def _pooled(self, x: Tensor, order: str | None = None) -> Tensor:
        if self.pool is None or order not in (None, self.pool_order):
            return x
        return pool_keys(x, self.pool)

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Queries, keys and values as maps, and the factor on the logits that is left.

        In ``concatenation`` the two parts of the logits in place of queries and keys.
        """
        early = self._pooled(x, "before_conv")
        if self.mode in _PROJECTED:
            if early is x:
                (q, k, v), scale = project_scaled(
                    x,
                    self.scale,
                    self.theta,
                    self.phi,
                    self.g,
                    pool=self.pool,
                    form=self.implementation,
                )
            else:
                (q,), scale = project_scaled(
                    x, self.scale, self.theta, pool=self.pool, form=self.implementation
                )
                k, v = project_together(early, self.phi, self.g)
            return q, self._pooled(k, "after_conv"), self._pooled(v, "after_conv"), scale
        if self.mode == "concatenation" and self.pool is None:
            weight = matrix_of(self.concat_project, x, 2 * self.inter_channels, 1, 1)
            a, b, v = logits_and_values(x, self.theta, self.phi, self.g, weight)
            return a, b, v, self.scale
        v = self._pooled(project(self.g, early), "after_conv")
        if self.mode == "gaussian":
            x = x.to(v.dtype)  # under autocast
            return x, self._pooled(x), v, self.scale
        weight = matrix_of(self.concat_project, x, 2 * self.inter_channels, 1, 1)
        a = logit_part(x, self.theta, weight, True)
        if self.pool_order == "after_conv":
            return a, logit_part(self._pooled(self.phi(x)), None, weight, False), v, self.scale
        return a, logit_part(early, self.phi, weight, False), v, self.scale

    def extra_repr(self) -> str:
        """The options, for ``print(block)``."""
        window = f", temporal_window={self.temporal_window}" if self.temporal_window else ""
        return (
            f"mode={self.mode}, sub_sample={self.sub_sample}, pool_order={self.pool_order}{window}"
        )


def _checked_window(frames: int | None, dims: int, pool: Sequence[int] | None) -> int | None:
    """``temporal_window``, if a block of so many dimensions may have it and the pool fits into it."""
    if frames is None:
        return None
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise BlockError(f"temporal_window must be a positive number of frames, got {frames!r}")
    if dims != 3:
        raise BlockError(
            f"temporal_window={frames} is of clips, and the block has dims={dims}; leave it out"
        )
    if pool is not None and frames % pool[0]:
        raise BlockError(
            f"temporal_window={frames} must be a multiple of the {pool[0]} frames that sub_sample pools"
        )
    return frames


@register("non_local", source="Wang et al., Non-local Neural Networks, CVPR 2018")
def build_non_local(
    in_channels: int,
    *,
    dims: int,
    mode: Mode = "embedded_gaussian",
    reduction: float = 2,
    inter_channels: int | None = None,
    sub_sample: bool | list[int] = False,
    pool_order: PoolOrder = "after_conv",
    use_scale: bool = False,
    norm: Norm = "bn",
    zero_init: bool = True,
    bias: bool = True,
    temporal_window: int | None = None,
    implementation: Implementation = "auto",
) -> NonLocal:
    """Build a :class:`NonLocal` from the options of a recipe.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions of the host's output.
        mode: The pairwise function.
        reduction: C' = C // reduction, at least 1; ignored where ``inter_channels`` is given.
        inter_channels: C' itself.
        sub_sample: Max-pool keys and values over space, or by so many along each axis.
        pool_order: Pool after or before the convolutions.
        use_scale: Scale the logits of the softmax modes.
        norm: The normalisation after ``out``.
        zero_init: Start as the identity.
        bias: Whether convolutions have a bias.
        temporal_window: Frames of a clip attend within windows of so many.
        implementation: The exact form that computes it.
    """
    if inter_channels is None:
        inter_channels = reduced(in_channels, reduction)
    return NonLocal(
        in_channels,
        inter_channels,
        dims=dims,
        mode=mode,
        sub_sample=sub_sample,
        pool_order=pool_order,
        use_scale=use_scale,
        norm=norm,
        zero_init=zero_init,
        bias=bias,
        temporal_window=temporal_window,
        implementation=implementation,
    )
