"""What a foreign checkpoint layout is: the blocks in it, and the names of everything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from nlsurgery.errors import CheckpointError

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the keys of a checkpoint do not tell; ``None`` is the project's own default.

    Attributes:
        mode: Pairwise function of non-local blocks; the keys tell ``gaussian`` and
            ``concatenation`` from the rest, but not ``embedded_gaussian`` from ``dot_product``.
        use_scale: Whether the logits are divided by √C', where the project has a switch for it.
        sub_sample: Whether keys and values are pooled, where the pool leaves no trace in the names; or
            by how many along each axis.
        pool_order: Of our own blocks: ``after_conv`` or ``before_conv``.
        recurrence: Passes of criss-cross attention.
        temporal_window: Frames that attend to each other, where a project has such windows; 0 for all.
        bn_eps: Epsilon of the blocks' BatchNorm, if it is not 1e-5; it goes into the variance.
    """

    mode: str | None = None
    use_scale: bool | None = None
    sub_sample: bool | Sequence[int] | None = None
    pool_order: str | None = None
    recurrence: int | None = None
    temporal_window: int | None = None
    bn_eps: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not ``None``."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def limited(self, names: Collection[str]) -> Choices:
        """These choices, the fields not in ``names`` set to ``None``."""
        return Choices(**{name: value for name, value in self.given().items() if name in names})

    def over(self, options: Mapping[str, Any]) -> Choices:
        """These choices, and where one is ``None`` the option of the same name."""
        known = {name: value for name, value in options.items() if name in asdict(self)}
        return Choices(**{**known, **self.given()})


@dataclass(frozen=True, slots=True)
class Converted:
    """One block in other names.

    Attributes:
        tensors: By the new local name.
        origin: New local name -> old local name, for those that have one; the rest was added.
        options: What the block on the new side is built with, beside its channels.
        channels: C.
        dims: Spatial dimensions of the kernels; 0 where the block has none.
        type: Its type in nlsurgery.
    """

    tensors: dict[str, Tensor]
    origin: dict[str, str]
    options: dict[str, Any]
    channels: int
    dims: int
    type: str


@dataclass(frozen=True, slots=True)
class OurBlock:
    """One of nlsurgery's blocks: its values, and the options it was built with."""

    type: str
    tensors: State
    options: Mapping[str, Any]
    where: str


class ToOurs(Protocol):
    """Turn the tensors of one foreign block into ours."""

    def __call__(self, state: State, choices: Choices, where: str) -> Converted:
        """Convert ``state``, by local name; errors name the block as ``where``."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """One kind of block in a layout.

    Attributes:
        name: Its class in the other project.
        pattern: Full match of a key of such a block, with groups ``prefix`` and ``local``.
        accepts: Whether a set of local names is such a block.
        to_ours: Foreign tensors -> ours.
        from_ours: Ours -> foreign tensors.
        host: (block prefix without its last dot, all keys) -> our host, ``None`` if unknown.
        name_at: (our host) -> block prefix, ``None`` where the layout has no name for it.
        types: Our block types that it can hold.
        exclusive: No other key may stand under the block's prefix.
        separator: Between prefix and local name.
        choices: The fields of :class:`Choices` that ``to_ours`` reads.
    """

    name: str
    pattern: re.Pattern[str]
    accepts: Callable[[frozenset[str]], bool]
    to_ours: ToOurs
    from_ours: Callable[[OurBlock], Converted]
    host: Callable[[str, frozenset[str]], str | None]
    name_at: Callable[[str], str | None]
    types: tuple[str, ...]
    exclusive: bool = False
    separator: str = "."
    choices: tuple[str, ...] = ()

    def key(self, prefix: str, local: str) -> str:
        """The full key of a local name."""
        return f"{prefix}{self.separator}{local}" if prefix else local


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """A block in a state_dict: its kind, prefix (without the last dot) and keys by local name."""

    kind: BlockKind
    prefix: str
    keys: Mapping[str, str]


def unknown_host(prefix: str, keys: frozenset[str]) -> str | None:
    """Say that a prefix tells no place."""
    return None


def same_name(key: str) -> str | None:
    """Keep a base key."""
    return key


@dataclass(frozen=True, slots=True)
class Layout:
    """A project's way to name a checkpoint.

    Attributes:
        name: What ``--from`` and ``--to`` call it.
        source: The project.
        kinds: The kinds of block in it.
        base_to_ours: Base key -> torchvision's name, ``None`` for what a backbone does not have.
        base_from_ours: The other way.
        aliases: Other names of it.
        tells: Whether keys speak for this one of several layouts that share their blocks' names.
        wrapper: Under which name the project keeps the state_dict in a file.
        frozen_affine: Whether a norm without statistics is a frozen scale and shift.
    """

    name: str
    source: str
    kinds: tuple[BlockKind, ...]
    base_to_ours: Callable[[str], str | None] = same_name
    base_from_ours: Callable[[str], str | None] = same_name
    aliases: tuple[str, ...] = ()
    tells: Callable[[frozenset[str]], bool] = field(default=lambda keys: True)
    wrapper: str = "state_dict"
    frozen_affine: bool = False

    def blocks(self, keys: frozenset[str]) -> list[FoundBlock]:
        """Find the blocks of this layout among keys."""
        found: list[FoundBlock] = []
        used: set[str] = set()
        for kind in self.kinds:
            groups: dict[str, dict[str, str]] = {}
            for key in sorted(keys - used):
                if (match := kind.pattern.fullmatch(key)) is not None:
                    prefix = (match["prefix"] or "").rstrip("._")
                    groups.setdefault(prefix, {})[match["local"]] = key
            for prefix, members in groups.items():
                if not kind.accepts(frozenset(members)):
                    continue
                under = kind.key(prefix, "") if prefix else ""
                if kind.exclusive and any(
                    key.startswith(under) for key in keys - set(members.values())
                ):
                    continue
                found.append(FoundBlock(kind, prefix, members))
                used |= set(members.values())
        return found


def require_shape(state: State, key: str, shape: tuple[int, ...], where: str) -> None:
    """Check one tensor of a block.

    Raises:
        CheckpointError: It is missing or has another shape.
    """
    if key not in state:
        raise CheckpointError(f"{where}: the block lacks {key!r}; is the checkpoint complete?")
    if tuple(state[key].shape) != shape:
        raise CheckpointError(
            f"{where}: {key} must be {shape} beside the block's other tensors, but is "
            f"{tuple(state[key].shape)}"
        )


def cannot_hold(layout: str, where: str, what: str, way_out: str) -> CheckpointError:
    """The error of a block that the other project has no form for."""
    return CheckpointError(f"{where}: {layout} cannot hold {what}; {way_out}")
