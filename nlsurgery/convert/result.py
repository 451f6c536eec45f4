"""What a conversion did: every key of the input and of the output is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nlsurgery.tables import text_table


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One converted block.

    Attributes:
        name: Its prefix in the source.
        place: Its prefix in the result.
        host: The module of the backbone that it stands after; ``None`` if unknown.
        type: Its type in nlsurgery.
        channels: C; 0 where the block has no channels of its own.
        dims: Spatial dimensions; 0 where it works in any.
        options: What the block in the result is built with.
    """

    name: str
    place: str
    host: str | None
    type: str
    channels: int
    dims: int
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Left:
    """A key that did not go over, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted state_dict.

    Attributes:
        source: The layout it came in.
        target: The layout it is in.
        tensors: The result.
        origin: Key of the result -> key of the source, ``None`` for what was added.
        left: What did not go over.
        blocks: The blocks in it.
        notes: What the keys did not tell and was assumed, and what was reshaped.
    """

    source: str
    target: str
    tensors: dict[str, Tensor]
    origin: dict[str, str | None]
    left: tuple[Left, ...]
    blocks: tuple[BlockSpec, ...]
    notes: tuple[str, ...] = ()

    @property
    def taken(self) -> tuple[str, ...]:
        """Keys that kept their names."""
        return tuple(new for new, old in self.origin.items() if new == old)

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """(old, new) of those that did not."""
        return tuple((old, new) for new, old in self.origin.items() if old not in (None, new))  # type: ignore[misc]

    @property
    def added(self) -> tuple[str, ...]:
        """Keys that the source lacks, such as zero biases and counters."""
        return tuple(new for new, old in self.origin.items() if old is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; no tensor values."""
        return {
            "source": self.source,
            "target": self.target,
            "taken": list(self.taken),
            "renamed": [list(pair) for pair in self.renamed],
            "added": list(self.added),
            "left": [asdict(row) for row in self.left],
            "blocks": [asdict(block) for block in self.blocks],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = ("block", "becomes", "type", "chs", "options")
        rows = [
            (
                spec.name or "(all)",
                spec.place or "(all)",
                spec.type,
                str(spec.channels or "any"),
                ", ".join(f"{name}={value}" for name, value in spec.options.items()),
            )
            for spec in self.blocks
        ]
        lines = [text_table(head, rows)]
        if self.left:
            left = [(row.key, row.reason) for row in self.left]
            lines.append("\n" + text_table(("left", "because"), left))
        lines += [f"note: {note}" for note in self.notes]
        count = len(self.blocks)
        lines.append(
            f"{self.source} -> {self.target}: {count} block{'s' if count != 1 else ''}, "
            f"{len(self.taken)} keys taken, {len(self.renamed)} renamed, {len(self.added)} added, "
            f"{len(self.left)} left"
        )
        return "\n".join(lines)


def recipe_of(conversion: Conversion) -> dict[str, Any] | None:
    """The recipe whose blocks hold a conversion to nlsurgery; ``None`` where a host is unknown.

    Args:
        conversion: One with ``target == "nlsurgery"``.
    """
    inserts = []
    for spec in conversion.blocks:
        if spec.host is None:
            return None
        block = {"type": spec.type, **spec.options}
        inserts.append({**_place(spec.host), "block": block})
    return {"version": 1, "inserts": inserts} if inserts else None


def _place(host: str) -> dict[str, Any]:
    """A host in a recipe's words: after a block of a stage, or inside it."""
    parts = host.split(".")
    for end in range(len(parts), 1, -1):
        stage, index = ".".join(parts[: end - 1]), parts[end - 1]
        if index.isdecimal():
            place: dict[str, Any] = {"stage": stage, "after": int(index)}
            return place | ({"at": ".".join(parts[end:])} if parts[end:] else {})
    return {"stage": host}
