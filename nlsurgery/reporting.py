"""What went where: the report of an operated model, and the rows that plans and reports print."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from nlsurgery.errors import ModelError
from nlsurgery.splice import hosts, placed
from nlsurgery.tables import size_text, text_table
from nlsurgery.walk import CHILD_NAME, check_operable


@dataclass(frozen=True, slots=True)
class Insertion:
    """One inserted block.

    Attributes:
        fqn: The block's own path in the model.
        stage: Its stage.
        block: The residual block it stands after or in.
        at: ``output``, or the sub-module's path in the block.
        type: Block type.
        num_chs: Channels.
        feature_size: (H, W) or (T, H, W) at the probed input size.
        layout: Layout of the host's output.
        num_params: Parameters it added.
    """

    fqn: str
    stage: str
    block: str
    at: str
    type: str
    num_chs: int
    feature_size: tuple[int, ...]
    layout: str
    num_params: int


@dataclass(frozen=True, slots=True)
class SurgeryReport:
    """What was inserted into a model.

    Attributes:
        model: Its class name.
        insertions: One entry a block, in module order.
        new_keys: The state_dict keys that the original model lacks.
        num_params_added: Parameters in all blocks.
        num_params_original: Parameters of the original model.
    """

    model: str
    insertions: tuple[Insertion, ...]
    new_keys: tuple[str, ...]
    num_params_added: int
    num_params_original: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("fqn", "stage", "after", "type", "chs", "size", "layout", "params")
        rows = [
            (
                row.fqn,
                row.stage,
                row.block if row.at == "output" else f"{row.block} at {row.at}",
                row.type,
                str(row.num_chs),
                size_text(row.feature_size),
                row.layout,
                f"{row.num_params:,}",
            )
            for row in self.insertions
        ]
        share = self.num_params_added / max(1, self.num_params_original)
        total = (
            f"{self.model}: {len(rows)} block{'s' if len(rows) != 1 else ''}, "
            f"{self.num_params_added:,} parameters added to {self.num_params_original:,} (+{share:.1%})"
        )
        return text_table(head, rows) + "\n" + total


def report(model: nn.Module) -> SurgeryReport:
    """Report what is inserted in a model.

    Args:
        model: An operated model; an original one gives a report without insertions.
    """
    check_operable(model)
    insertions = [
        Insertion(
            fqn,
            record.stage,
            record.block,
            record.at,
            record.type,
            record.num_chs,
            record.feature_size,
            layout.kind,
            sum(p.numel() for p in block.parameters()) if block is not None else 0,
        )
        for _, fqn, block, record, layout, _ in placed(model)
    ]
    keys = tuple(key for key in model.state_dict() if is_inserted_key(key)) if insertions else ()
    added = sum(row.num_params for row in insertions)
    everything = sum(p.numel() for p in model.parameters())
    return SurgeryReport(type(model).__name__, tuple(insertions), keys, added, everything - added)


def inserted_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every inserted block by its path, in module order.

    Args:
        model: An operated model.
    """
    check_operable(model)
    return {row.fqn: row.block for row in placed(model) if row.block is not None}


def require_operated(model: nn.Module) -> None:
    """Refuse a model without inserted blocks.

    Raises:
        ModelError: Nothing is inserted.
    """
    check_operable(model)
    if not any(True for _ in hosts(model)):
        raise ModelError(
            f"{type(model).__name__} has no inserted block: call nlsurgery.apply(model, recipe) first"
        )


def is_inserted_key(key: str) -> bool:
    """Whether a state_dict key belongs to an inserted block."""
    return CHILD_NAME in key.split(".")
