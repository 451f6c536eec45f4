"""Insert non-local and self-attention blocks into any timm or torchvision backbone.

    model = nlsurgery.apply(timm.create_model("resnet50", pretrained=True), "res4_5blocks")

Every block is the identity at init and every original key stays as it is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlsurgery import blocks
    from nlsurgery.checkpoint import load, save
    from nlsurgery.errors import (
        BlockError,
        CheckpointError,
        DataError,
        ModelError,
        RecipeError,
        SelectorError,
        SurgeryError,
        VerifyError,
    )
    from nlsurgery.parameters import freeze_backbone, inserted_parameters, param_groups
    from nlsurgery.planning import Plan
    from nlsurgery.recipe import Recipe, list_recipes, load_recipe
    from nlsurgery.reporting import Insertion, SurgeryReport, inserted_blocks, report
    from nlsurgery.stages import Anatomy, Stage
    from nlsurgery.surgery import apply, disabled, inspect, plan, remove, verify

__version__ = "0.1.0"

_HOMES = {
    "blocks": "",
    "checkpoint": "load save",
    "errors": "BlockError CheckpointError DataError ModelError RecipeError SelectorError SurgeryError "
    "VerifyError",
    "parameters": "freeze_backbone inserted_parameters param_groups",
    "planning": "Plan",
    "recipe": "Recipe list_recipes load_recipe",
    "reporting": "Insertion SurgeryReport inserted_blocks report",
    "stages": "Anatomy Stage",
    "surgery": "apply disabled inspect plan remove verify",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Anatomy",
    "BlockError",
    "CheckpointError",
    "DataError",
    "Insertion",
    "ModelError",
    "Plan",
    "Recipe",
    "RecipeError",
    "SelectorError",
    "Stage",
    "SurgeryError",
    "SurgeryReport",
    "VerifyError",
    "apply",
    "blocks",
    "disabled",
    "freeze_backbone",
    "inserted_blocks",
    "inserted_parameters",
    "inspect",
    "list_recipes",
    "load",
    "load_recipe",
    "param_groups",
    "plan",
    "remove",
    "report",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"nlsurgery.{_HOME_OF[name]}"), name)
    elif name in ("blocks", "checkpoint"):
        value = importlib.import_module(f"nlsurgery.{name}")
    else:
        raise AttributeError(f"module 'nlsurgery' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
