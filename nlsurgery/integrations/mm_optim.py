"""Optimiser settings for operated models in mmengine: one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from nlsurgery.errors import ModelError
from nlsurgery.integrations.mm_operated import Operated, blocks_of
from nlsurgery.integrations.mm_plugins import all_blocks
from nlsurgery.integrations.mm_surgery import BACKBONE, freeze
from nlsurgery.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS

_OWN = {
    "inserted_lr_mult": 1.0,
    "inserted_decay_mult": 1.0,
    "gate_decay_mult": 0.0,
    "freeze_backbone": False,
}
_DEFAULTS = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()  # type: ignore[untyped-decorator]
class OptimWrapperConstructor(DefaultOptimWrapperConstructor):  # type: ignore[misc]
    """mmengine's default constructor with options for the blocks in ``paramwise_cfg``.

    ``inserted_lr_mult`` and ``inserted_decay_mult`` multiply what the other options give the blocks'
    parameters; ``gate_decay_mult`` (0 by default) is for their gates: a decayed γ is pulled back to the
    zero it starts from. ``freeze_backbone=True`` trains the blocks, and heads and necks, alone.
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        """Check the options.

        Args:
            optim_wrapper_cfg: As mmengine's.
            paramwise_cfg: As mmengine's, with the options above.

        Raises:
            ModelError: An option that neither knows.
        """
        given = dict(paramwise_cfg or {})
        unknown = sorted(set(given) - set(_OWN) - set(_DEFAULTS))
        if unknown:
            raise ModelError(
                f"nlsurgery.OptimWrapperConstructor: paramwise_cfg has no option "
                f"{', '.join(map(repr, unknown))}; there are: {', '.join((*_OWN, *_DEFAULTS))}"
            )
        self._own = {name: given.pop(name, default) for name, default in _OWN.items()}
        self._blocks: dict[int, bool] = {}
        self._left_out: set[int] = set()
        super().__init__(optim_wrapper_cfg, given)
        # An empty one would make mmengine skip add_params.
        self.paramwise_cfg = {"bypass_duplicate": False, **given}
        if self._own["inserted_lr_mult"] != 1 and self.base_lr is None:
            raise ModelError(
                "nlsurgery.OptimWrapperConstructor: inserted_lr_mult needs the optimizer's lr"
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimiser and its wrapper for a model.

        Args:
            model: A model with blocks, maybe wrapped (DDP).

        Raises:
            ModelError: It has no block, or nothing to freeze.
        """
        plain: Any = model.module if is_model_wrapper(model) else model
        blocks = all_blocks(plain)
        if not blocks:
            raise ModelError(
                f"nlsurgery.OptimWrapperConstructor: {type(plain).__name__} holds no block of "
                f"nlsurgery; build it with nlsurgery.Surgery or plugins="
            )
        self._blocks = {}
        for block in blocks.values():
            gates = {id(getattr(m, "gate", None)) for m in block.modules()}
            self._blocks.update({id(p): id(p) in gates for p in block.parameters()})
        if self._own["freeze_backbone"]:
            self._left_out = self._freeze(plain, wrapped=plain is not model)
        return super().__call__(model)

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any
    ) -> None:
        """Collect parameter groups as mmengine does, then set those of the blocks."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        params[:] = [g for g in params if id(g["params"][0]) not in self._left_out]
        for group in params:
            is_gate = self._blocks.get(id(group["params"][0]))
            if is_gate is None:
                continue
            if self._own["inserted_lr_mult"] != 1:
                group["lr"] = group.get("lr", self.base_lr) * self._own["inserted_lr_mult"]
            mult = self._own["gate_decay_mult" if is_gate else "inserted_decay_mult"]
            if self.base_wd is not None and mult != 1:
                group["weight_decay"] = group.get("weight_decay", self.base_wd) * mult

    def _freeze(self, model: nn.Module, *, wrapped: bool) -> set[int]:
        """Freeze the backbones; returns the ids of their parameters.

        DDP has counted its parameters already and waits for their gradients: in a wrapped model they
        are only left out of the optimiser.
        """
        found = _backbones(model)
        before = [(p, p.requires_grad) for m in found for p in m.parameters()]
        for backbone in found:
            freeze(backbone)
        frozen = {id(p) for p, _ in before if not p.requires_grad and id(p) not in self._blocks}
        if wrapped:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
        return frozen


def _backbones(model: nn.Module) -> list[nn.Module]:
    found = [
        m for m in model.modules() if isinstance(m, Operated) and any(True for _ in blocks_of(m))
    ]
    inner: list[nn.Module] = [
        m for m in found if not any(o is not m and _holds(m, o) for o in found)
    ]
    if not inner and isinstance(getattr(model, BACKBONE, None), nn.Module):
        inner = [getattr(model, BACKBONE)]
    if not inner:
        raise ModelError(
            f"nlsurgery.OptimWrapperConstructor: freeze_backbone=True, but {type(model).__name__} has "
            f"no backbone= and was not built with nlsurgery.Surgery"
        )
    return inner


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


@OPTIM_WRAPPERS.register_module()  # type: ignore[untyped-decorator]
class CPUAmpOptimWrapper(OptimWrapper):  # type: ignore[misc]
    """Mixed precision on the CPU in bfloat16, which ``AmpOptimWrapper`` refuses there."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward under autocast in bfloat16."""
        with super().optim_context(model), autocast(device_type="cpu", dtype=torch.bfloat16):
            yield
