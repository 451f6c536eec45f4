"""Blocks of other libraries and of users, blended in by γ: z = x + γ(A(x) − x), γ = 0 at init."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nlsurgery.blocks.base import GammaBlock, checked_dims
from nlsurgery.blocks.registration import register
from nlsurgery.errors import BlockError, close_names


class GammaBlend(GammaBlock):
    """Any module A that keeps the shape, made the identity at init.

    Child ``inner`` is A. Where A(x) − x is not finite it counts as 0, so a zero γ lets neither NaN
    nor inf through. What A does besides its output (random numbers, running statistics) is A's.
    """

    def __init__(self, inner: nn.Module, in_channels: int, *, dims: int = 2) -> None:
        """Wrap a module.

        Args:
            inner: A, from (B, C, *spatial) to the same shape; it must not change its input.
            in_channels: C.
            dims: Spatial dimensions: 1, 2 or 3.
        """
        super().__init__(in_channels, dims)
        self.inner = inner

    def branch(self, x: Tensor) -> Tensor:
        """A(x) − x.

        Raises:
            BlockError: A changes the shape, gives no tensor, or writes into its input.
        """
        before = _version(x)
        return _difference(self.inner(x), x, before, type(self.inner).__name__)


@torch.fx.wrap
def _version(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


@torch.fx.wrap
def _difference(y: Any, x: Tensor, before: int, name: str) -> Tensor:
    if not isinstance(y, Tensor) or y.shape != x.shape:
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise BlockError(f"{name} must keep the shape {tuple(x.shape)}, but gave {came}")
    if _version(x) != before:
        raise BlockError(
            f"{name} writes into its input, which is the host's output; use its form that does not "
            "(inplace=False)"
        )
    return y.to(x.dtype) - x


def import_foreign(path: str, allow_imports: Sequence[str]) -> Callable[..., Any]:
    """Import what builds a user's block, where that is allowed.

    Args:
        path: ``"package.module.Name"``, an ``nn.Module`` class or a function that gives one.
        allow_imports: Packages or modules that may be imported; an import runs their code.

    Raises:
        BlockError: The import is not allowed or fails.
    """
    module_name, _, name = path.rpartition(".")
    if not any(module_name == root or module_name.startswith(f"{root}.") for root in allow_imports):
        root = path.split(".")[0]
        raise BlockError(
            f"block type {path!r} would import {module_name or path!r}, which runs its code and is "
            f"not allowed; pass allow_imports=[{root!r}] if you trust it"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise BlockError(
            f"block type {path!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        hint = close_names(name, vars(module))
        raise BlockError(f"block type {path!r}: module {module_name} has no {name!r}{hint}")
    if not callable(found):
        raise BlockError(
            f"block type {path!r} must be an nn.Module class or a function that builds one, but it is "
            f"a {type(found).__name__}"
        )
    return cast("Callable[..., Any]", found)


def build_foreign(
    path: str, in_channels: int, *, dims: int, options: Mapping[str, Any]
) -> GammaBlend:
    """Build a user's block, which :func:`import_foreign` imported before, and blend it in.

    It is called with ``in_channels`` first, and with ``dims`` where it has such a parameter.

    Args:
        path: As in :func:`import_foreign`; nothing is imported here.
        in_channels: C of the host.
        dims: Spatial dimensions of the host's output.
        options: Further keyword arguments.

    Raises:
        BlockError: It was not imported before, or what is built is no module.
    """
    module_name, _, name = path.rpartition(".")
    factory = getattr(sys.modules.get(module_name), name, None)
    if factory is None:
        raise BlockError(f"block type {path!r} has not been imported; read its recipe first")
    try:
        parameters = inspect.signature(factory).parameters
        extra = {"dims": dims} if "dims" in parameters else {}
        inner = factory(in_channels, **extra, **options)
    except (TypeError, ValueError) as error:
        raise BlockError(
            f"block type {path!r} cannot be built with in_channels={in_channels} and "
            f"{dict(options)}: {error}"
        ) from error
    if not isinstance(inner, nn.Module):
        raise BlockError(f"block type {path!r} must give an nn.Module, got {type(inner).__name__}")
    return GammaBlend(inner, in_channels, dims=dims)


@register("timm", source="timm.layers.create_attn, blended in by a zero γ")
def build_timm(
    in_channels: int, *, dims: int, name: str, options: dict[str, Any] | None = None
) -> GammaBlend:
    """Build an attention layer of timm and blend it in.

    Args:
        in_channels: C of the host.
        dims: Spatial dimensions, 2.
        name: What ``timm.layers.create_attn`` calls it: ``eca``, ``se``, ``cbam``, ``gc``, …
        options: Keyword arguments of that layer.

    Raises:
        BlockError: timm has no such layer, or cannot build it.
    """
    checked_dims(dims, (2,), block="timm")
    from timm.layers import create_attn, get_attn

    try:
        known = get_attn(name)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise BlockError(f"timm.layers.create_attn knows no {name!r}: {error}") from error
    if known is None:
        raise BlockError("timm: name must not be empty")
    try:
        inner = create_attn(name, in_channels, **(options or {}))
    except (AssertionError, TypeError, ValueError) as error:
        raise BlockError(f"timm's {name!r} cannot be built with {options}: {error}") from error
    return GammaBlend(inner, in_channels, dims=dims)
