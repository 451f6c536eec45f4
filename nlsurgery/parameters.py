"""The inserted parameters: to list, to group for an optimiser, to train alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from nlsurgery.reporting import inserted_blocks, require_operated


def inserted_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all inserted blocks, in module order.

    Args:
        model: An operated model.

    Raises:
        ModelError: Nothing is inserted.
    """
    require_operated(model)
    found = [p for block in inserted_blocks(model).values() for p in block.parameters()]
    return list({id(p): p for p in found}.values())


def param_groups(
    model: nn.Module, lr: float, *, inserted_lr_mult: float = 1.0, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups for a ``torch.optim`` optimiser.

    Vectors and scalars (γ, norms, biases) get no weight decay, in the backbone and in the blocks:
    a decayed γ is pulled back to the zero it starts from.

    Args:
        model: An operated model.
        lr: Learning rate of the backbone.
        inserted_lr_mult: Factor on ``lr`` for the inserted blocks.
        weight_decay: Of weights with two or more dimensions; the paper's is 1e-4.

    Returns:
        Up to four groups with ``name``, ``params``, ``lr`` and ``weight_decay``; empty ones left out.

    Raises:
        ModelError: Nothing is inserted.
    """
    inserted = {id(p) for p in inserted_parameters(model)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in inserted, parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    made = []
    for (is_inserted, decays), params in sorted(groups.items()):
        place = "inserted" if is_inserted else "backbone"
        made.append(
            {
                "name": place if decays else f"{place}_no_decay",
                "params": params,
                "lr": lr * inserted_lr_mult if is_inserted else lr,
                "weight_decay": weight_decay if decays else 0.0,
            }
        )
    return made


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Train the inserted blocks alone: every other parameter gets ``requires_grad=False``.

    BatchNorm layers of the backbone still update their statistics in train mode.

    Args:
        model: An operated model; changed in place.

    Returns:
        The same model.

    Raises:
        ModelError: Nothing is inserted.
    """
    kept = {id(p) for p in inserted_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    return model
