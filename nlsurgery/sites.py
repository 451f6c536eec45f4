"""Where blocks go and what is remembered of them: plain data, shared by planning and splicing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nlsurgery.blocks.layout import Layout
from nlsurgery.walk import CHILD_NAME, HOOK_MARK, OutputPath


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one inserted block.

    Attributes:
        stage: The stage's name.
        block: fqn of the residual block it stands after or in.
        at: ``output``, or the sub-module's path inside the block.
        type: Block type.
        num_chs: Channels of the host's output.
        feature_size: (H, W) or (T, H, W) at the probed input size.
        order: Which ``apply`` put it there, from 0.
        recipe: That recipe as plain data.
        input_size: The input size it was probed at, without the batch.
    """

    stage: str
    block: str
    at: str
    type: str
    num_chs: int
    feature_size: tuple[int, ...]
    order: int
    recipe: Mapping[str, Any]
    input_size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """Where one ``Inserted`` goes.

    Attributes:
        host: fqn of the module that gets the hook.
        owner: Path from the host to the descendant that holds the child, None for the host itself.
        guard: fqn of the residual block around an inner host, None at a block's output.
        layout: Layout of the host's output.
        path: Where the feature map is in it.
    """

    host: str
    owner: str | None
    guard: str | None
    layout: Layout
    path: OutputPath

    @property
    def child_fqn(self) -> str:
        """fqn of the ``Inserted`` child."""
        return ".".join(part for part in (self.host, self.owner, CHILD_NAME) if part)


def find_hook(module: nn.Module) -> int | None:
    """Id of nlsurgery's forward hook on a module, None when it has none."""
    for key, hook in module._forward_hooks.items():
        if getattr(hook, HOOK_MARK, False):
            return key
    return None
