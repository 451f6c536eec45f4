"""The module tree as it stands: nothing is run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy

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
    reason = _hides_modules(model)
    if reason is not None:
        raise ModelError(reason)
    if isinstance(model, torch.fx.GraphModule):
        raise ModelError(
            f"{type(model).__name__} is a traced graph (create_feature_extractor, symbolic_trace) in "
            f"which the residual blocks are no modules any more: operate on the original model, then "
            f"extract or trace it"
        )
    return model


def check_open(model: object) -> nn.Module:
    """Refuse as :func:`check_operable` does, and also what holds such modules further inside.

    New blocks would be there and yet never run (compiled code is not traced again for a new hook), or
    never be kept in step between processes (the parameter list of a wrapper is fixed).

    Raises:
        ModelError: A module anywhere in ``model`` is wrapped, compiled, scripted or not initialised yet.
    """
    checked = check_operable(model)
    for fqn, module in checked.named_modules():
        reason = _hides_modules(module)
        if reason is None and module._compiled_call_impl is not None:
            reason = (
                f"{type(module).__name__} is compiled in place (model.compile()), and compiled code does "
                f"not see blocks come or go: operate on a model that is not compiled yet, compile after"
            )
        if reason is not None:
            raise ModelError(f"{fqn}: {reason}" if fqn else reason)
        lazy = [name for name, p in module.named_parameters(recurse=False) if is_lazy(p)]
        if lazy:
            raise ModelError(
                f"{fqn or type(module).__name__}: {', '.join(lazy)} has no shape yet (a lazy module): "
                f"run the model once on a batch, then operate on it"
            )
    return checked


def _hides_modules(module: nn.Module) -> str | None:
    """Why blocks cannot be put into a module that is wrapped, compiled or scripted; None if they can."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind} is scripted and cannot take blocks: operate on the original, then script it"
    if hasattr(module, "_orig_mod"):
        return (
            "the model is compiled (torch.compile): operate on the original "
            "(model._orig_mod), then compile it again"
        )
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    if kind in wrappers or kind.startswith("MMDistributedDataParallel"):
        return (
            f"the model is wrapped in {kind}, whose parameter lists are fixed: operate on "
            f"model.module before wrapping it"
        )
    return None


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (fqn, module) of the original model: without what nlsurgery inserted."""
    for fqn, module in model.named_modules():
        if CHILD_NAME not in fqn.split("."):
            yield fqn, module


def parent_fqn(fqn: str) -> str:
    """Return the fqn of the module's parent: ``""`` for children of the root."""
    return fqn.rpartition(".")[0]
