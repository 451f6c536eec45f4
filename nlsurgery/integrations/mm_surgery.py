"""``type='nlsurgery.Surgery'``: build any model of any OpenMMLab library, and operate on it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from nlsurgery.errors import ModelError, RecipeError
from nlsurgery.integrations.mm_checkpoints import allow_runner_checkpoints
from nlsurgery.integrations.mm_hub import build_hub_model
from nlsurgery.integrations.mm_operated import Operated, SurgeryState, blocks_of, make_operated
from nlsurgery.integrations.mm_plugins import all_blocks
from nlsurgery.recipe import Recipe, load_recipe
from nlsurgery.registry import MODELS
from nlsurgery.reporting import report
from nlsurgery.surgery import apply

#: The attribute of a whole model that holds the part to operate on.
BACKBONE = "backbone"

InitCfg = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@MODELS.register_module(name="Surgery")  # type: ignore[untyped-decorator]
def build_surgery(
    model: str | Mapping[str, Any] | nn.Module,
    recipe: str | Mapping[str, Any],
    *,
    input_size: Sequence[int] | None = None,
    allow_imports: Sequence[str] = (),
    freeze_backbone: bool = False,
    norm_eval: bool = False,
    init_cfg: InitCfg | None = None,
    pretrained: str | None = None,
    data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
) -> nn.Module:
    """Build a model from a config and insert the blocks of a recipe.

    The result *is* the model: its class, attributes and state_dict keys are those of the config inside,
    with the inserted blocks' keys (``...nlsurgery.0...``) beside them. So it stands anywhere the plain
    config could: as ``backbone=``, or as a whole ``model=``.

    Args:
        model: The config of a backbone or of a whole model, of any library (write the scope, as in
            ``mmdet.ResNet``, unless it is the default scope); or ``timm/NAME``, ``torchvision/NAME``,
            or a dict with ``name`` and the options of ``nlsurgery.HubBackbone`` or, with
            ``num_classes``, of ``nlsurgery.HubClassifier``.
        recipe: A path, the name of a packaged recipe, or a recipe written out.
        input_size: (H, W), (C, H, W) or (C, T, H, W) to trace the model at; found out when None.
        allow_imports: Packages whose modules the recipe may import as block types.
        freeze_backbone: Train the blocks alone of what is operated on: its other parameters get no
            gradients and its BatchNorm keeps its statistics. Heads and necks of a whole model train on.
        norm_eval: Keep the BatchNorm of the blocks at its initial statistics, where it is an affine map:
            the paper's COCO models have no normalisation in their blocks. By default it learns its
            statistics, also where ``norm_eval=True`` of the model freezes those of the backbone.
        init_cfg: Initialisers for the whole, ``Pretrained`` for example, beside those in ``model``.
        pretrained: A checkpoint, the same as an ``init_cfg`` of type ``Pretrained``; mmsegmentation puts
            it here.
        data_preprocessor: Handed on to a whole model; the Runner puts it here.

    Returns:
        The operated model.

    Raises:
        ModelError: ``model`` is none of these, or cannot be traced.
        RecipeError: The recipe does not fit the model.
    """
    allow_runner_checkpoints()
    built = _build(model, data_preprocessor)
    _operate(built, _load(recipe, allow_imports), input_size)
    carrier = _carrier(built)
    state = SurgeryState(frozen=freeze_backbone, norm_eval=norm_eval)
    outer = _as_list(init_cfg)
    if pretrained is not None:
        outer.append({"type": "Pretrained", "checkpoint": pretrained})
    if carrier is built:
        state.init_cfg = outer
    make_operated(carrier, state)
    if carrier is not built and outer:
        make_operated(built, SurgeryState(init_cfg=outer))
    if freeze_backbone:
        freeze(carrier)
    print_log(f"nlsurgery: {report(built)}", logger="current", level=logging.INFO)
    return built


def freeze(model: nn.Module) -> None:
    """Stop the gradients of everything but the inserted blocks, and of a classifier's head.

    Args:
        model: An operated model or backbone.
    """
    if isinstance(model, Operated):
        model._surgery.frozen = True
    kept = {id(p) for block in all_blocks(model).values() for p in block.parameters()}
    kept |= {id(p) for p in getattr(model, "head_parameters", list)()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _build(model: object, data_preprocessor: Any) -> nn.Module:
    if isinstance(model, str):
        model = {"name": model}
    if isinstance(model, Mapping):
        config = dict(model)
        if data_preprocessor is not None:
            config.setdefault("data_preprocessor", data_preprocessor)
        if "type" in config:
            built: nn.Module = ROOT_MODELS.build(config)
            return built
        if "name" in config:
            return build_hub_model(config)
        raise ModelError(
            f"nlsurgery.Surgery: model= needs a 'type' (a config) or a 'name' (timm/NAME, "
            f"torchvision/NAME), but got the keys {', '.join(map(repr, config)) or 'none'}"
        )
    if isinstance(model, nn.Module) and data_preprocessor is None:
        return model
    raise ModelError(
        f"nlsurgery.Surgery: model= must be a config, a name or a module without data_preprocessor=, "
        f"but got {type(model).__name__}"
    )


def _load(recipe: object, allow_imports: Sequence[str]) -> Recipe:
    if isinstance(recipe, Mapping):
        return load_recipe(_plain(recipe), allow_imports=allow_imports)
    if isinstance(recipe, str):
        return load_recipe(recipe, allow_imports=allow_imports)
    raise RecipeError(
        f"nlsurgery.Surgery: recipe= must be a path, a recipe's name or a mapping, but got "
        f"{type(recipe).__name__}"
    )


def _plain(value: Any) -> Any:
    """Config dicts and tuples as the dicts and lists that a recipe is made of."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _operate(built: nn.Module, recipe: Recipe, input_size: Sequence[int] | None) -> None:
    inner = getattr(built, BACKBONE, built)
    frames = getattr(inner, "num_segments", None)
    if isinstance(frames, int) and not _is_3d(inner):
        # Temporal-shift backbones fold their frames into the batch: it must be a multiple of them.
        size = (3, 224, 224) if input_size is None else tuple(input_size)
        size = size if len(size) == 3 else (3, *size)
        apply(inner, recipe, example_input=torch.empty((2 * frames, *size), device="meta"))
        return
    apply(built, recipe, input_size=None if input_size is None else tuple(input_size))


def _is_3d(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in model.modules())


def _carrier(built: nn.Module) -> nn.Module:
    """The backbone of a whole model where every block is in it, else the model itself."""
    inner = getattr(built, BACKBONE, None)
    inside = all(path.startswith(f"{BACKBONE}.") for path, _ in blocks_of(built))
    return inner if isinstance(inner, nn.Module) and inside else built


def _as_list(init_cfg: InitCfg | None) -> list[dict[str, Any]]:
    if init_cfg is None:
        return []
    return [dict(cfg) for cfg in ([init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg))]
