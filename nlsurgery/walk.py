"""The module tree as it stands: nothing is run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx
from torch import nn

from nlsurgery.errors import ModelError

#: The name under which inserted blocks live in their host module.
CHILD_NAME = "nlsurgery"

#: Keys and indices that lead to one tensor in a module's output; ``()`` is the output itself.
OutputPath = tuple[int | str, ...]

#: The attribute that marks nlsurgery's own forward hooks.
HOOK_MARK = "__nlsurgery_hook__"


def check_operable(model: object) -> nn.Module:
    """Refuse what cannot be operated on: wrappers, compiled and scripted modules.

    Raises:
        ModelError: ``model`` is no ``nn.Module``, or one that hides the modules to operate on.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be an nn.Module, but got {type(model).__name__}")
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{kind} is scripted and cannot take blocks: operate on the original, then script it"
        )
    if isinstance(model, torch.fx.GraphModule):
        raise ModelError(
            f"{kind} is a traced graph (create_feature_extractor, symbolic_trace) in which the residual "
            f"blocks are no modules any more: operate on the original model, then extract or trace it"
        )
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model is compiled (torch.compile): operate on the original "
            "(model._orig_mod), then compile it again"
        )
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    if kind in wrappers or kind.startswith("MMDistributedDataParallel"):
        raise ModelError(
            f"the model is wrapped in {kind}, whose parameter lists are fixed: operate on "
            f"model.module before wrapping it"
        )
    return model


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (fqn, module) of the original model: without what nlsurgery inserted."""
    for fqn, module in model.named_modules():
        if CHILD_NAME not in fqn.split("."):
            yield fqn, module


def parent_fqn(fqn: str) -> str:
    """Return the fqn of the module's parent: ``""`` for children of the root."""
    return fqn.rpartition(".")[0]
