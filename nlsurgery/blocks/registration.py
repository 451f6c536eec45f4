"""Where blocks are registered: one decorator on a builder makes a block type of recipes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from nlsurgery.errors import BlockError, close_names

Builder = Callable[..., nn.Module]
B = TypeVar("B", bound=Builder)

#: Parameters of a builder that the surgery fills in, so that recipes cannot.
HOST_PARAMETERS = ("in_channels", "dims")


@dataclass(frozen=True, slots=True)
class BlockType:
    """One block type: its recipe name, how to build it, and which options it has."""

    name: str
    build: Builder
    source: str

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options a recipe may give: the builder's parameters less the host's."""
        parameters = inspect.signature(self.build).parameters
        return {name: p for name, p in parameters.items() if name not in HOST_PARAMETERS}


BLOCK_TYPES: dict[str, BlockType] = {}


def register(name: str, *, source: str) -> Callable[[B], B]:
    """Make a builder known to recipes as ``block: {type: <name>, ...}``.

    The builder is a class or function ``build(in_channels, *, dims, **options) -> nn.Module`` whose
    options are keyword parameters with annotations that pydantic can check (``int``, ``bool``,
    ``Literal[...]``) and defaults. The module maps (B, C, *spatial) with ``dims`` spatial
    dimensions to the same shape and dtype, and is the identity at init.

    Args:
        name: The type's name in recipes, in snake case.
        source: The paper it comes from.

    Raises:
        BlockError: ``name`` is taken.
    """

    def decorate(build: B) -> B:
        if name in BLOCK_TYPES:
            raise BlockError(f"block type {name!r} is registered already; pick another name")
        BLOCK_TYPES[name] = BlockType(name, build, source)
        return build

    return decorate


def block_type(name: str) -> BlockType:
    """Look up a registered block type.

    Raises:
        BlockError: No block of that name is registered.
    """
    if name not in BLOCK_TYPES:
        hint = close_names(name, BLOCK_TYPES)
        raise BlockError(
            f"no block type {name!r}{hint}; there are: {', '.join(sorted(BLOCK_TYPES))}"
        )
    return BLOCK_TYPES[name]
