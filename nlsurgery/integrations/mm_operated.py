"""What an operated model does more than its class: it keeps its blocks through mmengine's life cycle.

The model is not wrapped: its class is exchanged for a subclass of itself, so keys, attributes and
``isinstance`` stay as they are. Three things are added: ``init_weights`` leaves the blocks the
identity, ``train`` keeps them training inside frozen stages, and loading says which missing keys were
to be expected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, initialize
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nlsurgery.integrations.mixed import Mixed, mixed_class
from nlsurgery.splice import Inserted, hosts
from nlsurgery.walk import CHILD_NAME

#: Buffers that older checkpoints lack.
_OPTIONAL = "num_batches_tracked"


@dataclass(slots=True)
class SurgeryState:
    """What an operated model remembers.

    Attributes:
        init_cfg: Initialisers given to the surgery, beside the model's own.
        was_init: The model said that its weights are final (pretrained by timm, for example).
        frozen: Only the blocks train; the rest stays in eval mode without gradients.
        norm_eval: The blocks' BatchNorm stays at its initial statistics.
        initialised: ``init_weights`` has run.
        prefix: Where the model was in the checkpoint being loaded.
        loaded: Paths of the blocks that a checkpoint has filled.
        lost: Paths of the blocks that the last checkpoint did not fill.
        plain: The last checkpoint had no key of any block.
        given: What a checkpoint gave to blocks before ``init_weights`` ran, which it would undo.
    """

    init_cfg: list[dict[str, Any]] = field(default_factory=list)
    was_init: bool = False
    frozen: bool = False
    norm_eval: bool = False
    initialised: bool = False
    prefix: str = ""
    loaded: set[str] = field(default_factory=set)
    lost: tuple[str, ...] = ()
    plain: bool = False
    given: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Operated(Mixed, nn.Module):
    """Mixed into the class of an operated model; see :func:`make_operated`."""

    _surgery: SurgeryState

    def init_weights(self) -> None:
        """Initialise as the model's own class does; the blocks stay, or become again, the identity.

        Order: initialisers of the surgery, the model's own ``init_weights``, ``Pretrained`` of the
        surgery. Blocks that a checkpoint has filled keep what it gave them.
        """
        state = self._surgery
        is_base = isinstance(self, BaseModule)
        if state.initialised:
            if is_base:
                super().init_weights()  # type: ignore[misc]
            return
        state.initialised = True
        pretrained = [cfg for cfg in state.init_cfg if cfg["type"] == "Pretrained"]
        others = [cfg for cfg in state.init_cfg if cfg["type"] != "Pretrained"]
        if others:
            initialize(self, others)
        # Classes of timm have an init_weights too: it would wipe what timm has loaded.
        if is_base and not state.was_init:
            super().init_weights()  # type: ignore[misc]
        if pretrained:
            initialize(self, pretrained)
        _restore_identity(self)
        if is_base:
            self._is_init = True

    def train(self, mode: bool = True) -> Operated:
        """Set the mode. Blocks follow ``mode`` and stay trainable, also inside frozen stages."""
        state = self._surgery
        blocks = [block for _, block in blocks_of(self)]
        trainable = [(p, p.requires_grad) for block in blocks for p in block.parameters()]
        super().train(mode and not state.frozen)
        self.training = mode
        for parameter, flag in trainable:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for _, _, inserted in hosts(self):
            inserted.train(mode)
        if state.norm_eval:
            for block in blocks:
                for module in block.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        _note_loaded(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[no-untyped-call]


def make_operated(model: nn.Module, state: SurgeryState) -> nn.Module:
    """Exchange the class of an operated model for its subclass with :class:`Operated`.

    Args:
        model: An operated model; changed in place. One that has the class already gets the
            initialisers of ``state`` added to its own.
        state: What it shall remember.

    Returns:
        The same model.
    """
    if isinstance(model, Operated):
        own = model._surgery
        own.init_cfg += state.init_cfg
        own.frozen |= state.frozen
        own.norm_eval |= state.norm_eval
        return model
    if isinstance(model, BaseModule):
        state.was_init = model.is_init
        model.is_init = False
    model.__class__ = mixed_class(Operated, type(model))
    model.__dict__["_surgery"] = state
    model.register_load_state_dict_post_hook(_tell_missing)  # type: ignore[no-untyped-call]
    return model


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, block) of every inserted block."""
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, Inserted):
            paths[id(module)] = path
    for _, _, inserted in hosts(model):
        for name, block in inserted._modules.items():
            if block is not None:
                yield f"{paths[id(inserted)]}.{name}", block


def _restore_identity(model: Operated) -> None:
    """Re-initialise every block that no checkpoint has filled. Random state is not advanced."""
    state = model._surgery
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
        for path, block in blocks_of(model):
            if path in state.given:
                block.load_state_dict(state.given[path], strict=False)
            elif path not in state.loaded:
                block.reset_parameters()  # type: ignore[operator]
    state.given.clear()


def _note_loaded(model: Operated, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Remember which blocks a checkpoint fills, before it is read."""
    state = model._surgery
    state.prefix = prefix
    state.plain = not any(is_inserted(key) for key in state_dict if key.startswith(prefix))
    lost = []
    for path, block in blocks_of(model):
        wanted = {key: v for key, v in block.state_dict().items() if not key.endswith(_OPTIONAL)}
        start = f"{prefix}{path}."
        found = {key: state_dict[start + key] for key in wanted if start + key in state_dict}
        if all(key in found and found[key].shape == v.shape for key, v in wanted.items()):
            state.loaded.add(path)
            if state.initialised:
                state.given.pop(path, None)
            else:
                state.given[path] = found
        else:
            lost.append(path)
    state.lost = tuple(lost)


def _tell_missing(model: nn.Module, incompatible: Any) -> None:
    """After loading: tell the inserted keys that a plain checkpoint cannot have from lost ones.

    mmengine prints every missing key: those to be expected are taken out of its list and told in one
    line. torch returns its list to the caller, who gets it whole.
    """
    assert isinstance(model, Operated)
    state = model._surgery
    if not state.lost:
        return
    missing: list[str] = incompatible.missing_keys
    ours = {key for key in missing if key.startswith(state.prefix) and is_inserted(key)}
    name, total = type(model).__name__, sum(1 for _ in blocks_of(model))
    if state.plain:
        text = (
            f"nlsurgery: the checkpoint for {name} holds none of its {total} inserted blocks: their "
            f"{len(ours)} keys keep their values. To be expected of pretrained weights, not of a "
            f"checkpoint of this operated model"
        )
        print_log(text, logger="current", level=logging.INFO)
        if type(incompatible).__module__.startswith("mmengine"):
            missing[:] = [key for key in missing if key not in ours]
        return
    shown = ", ".join(state.lost[:5]) + (", ..." if len(state.lost) > 5 else "")
    text = (
        f"nlsurgery: the checkpoint for {name} holds {total - len(state.lost)} of its {total} inserted "
        f"blocks; LOST, because keys are missing ({len(ours)}) or have other shapes: {shown}. Was it "
        f"saved with another recipe?"
    )
    print_log(text, logger="current", level=logging.WARNING)


def is_inserted(key: str) -> bool:
    """Whether a state_dict key is an inserted block's."""
    return CHILD_NAME in key.split(".")
