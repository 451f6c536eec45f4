"""What is asked of a conversion, and the result as it is put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nlsurgery.convert.layout import Choices, Layout, State
from nlsurgery.convert.result import BlockSpec, Conversion, Left
from nlsurgery.errors import CheckpointError, close_names

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """One conversion between ours and a foreign layout; the fields as in ``convert_state``."""

    state: State
    layout: Layout
    choices: Choices
    places: Mapping[str, str]
    options: Options

    def check_places(self, prefixes: Iterable[str]) -> None:
        """Refuse places of blocks that are not there.

        Raises:
            CheckpointError: There is one.
        """
        known = list(prefixes)
        for place in self.places:
            if place not in known:
                raise CheckpointError(
                    f"--place {place}: no such block{close_names(place, known)}; there are "
                    f"{', '.join(repr(prefix) for prefix in known[:8])}"
                )


class Builder:
    """Collects a result; no key is written twice."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.origin: dict[str, str | None] = {}
        self.left: list[Left] = []
        self.blocks: list[BlockSpec] = []
        self.notes: list[str] = []

    def put(self, new: str, value: Tensor, old: str | None) -> None:
        """Add one tensor: its new key, and its old one if it has one.

        Raises:
            CheckpointError: The new key is taken.
        """
        if new in self.tensors:
            raise CheckpointError(
                f"{old or new} and {self.origin[new] or new} both become {new}; say with --place "
                f"where the blocks go"
            )
        self.tensors[new] = value
        self.origin[new] = old

    def done(self, source: str, target: str) -> Conversion:
        """The result."""
        return Conversion(
            source,
            target,
            self.tensors,
            self.origin,
            tuple(self.left),
            tuple(self.blocks),
            tuple(dict.fromkeys(self.notes)),
        )
