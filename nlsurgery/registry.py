"""The mmengine scope ``nlsurgery``: what ``type='nlsurgery.X'`` in a config resolves through.

mmengine imports this module by its name when it meets the scope, so no ``custom_imports`` is needed.
An ImportError raised here would be swallowed by mmengine: the module imports mmengine alone, and what
it registers lives in ``nlsurgery.integrations.mmengine``, which is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as ROOT_OPTIM_WRAPPERS
from mmengine.registry import Registry

SCOPE = "nlsurgery"
LOCATIONS = ["nlsurgery.integrations.mmengine"]


class ModelRegistry(Registry):  # type: ignore[misc]
    """A registry of models that also knows every block type registered up to now."""

    def get(self, key: str) -> Any:
        """Look up a class by its name, with or without the scope."""
        layers = importlib.import_module("nlsurgery.integrations.mm_plugins")
        layers.register_block_layers(self)
        return super().get(key)


MODELS = ModelRegistry("model", parent=ROOT_MODELS, scope=SCOPE, locations=LOCATIONS)
HOOKS = Registry("hook", parent=ROOT_HOOKS, scope=SCOPE, locations=LOCATIONS)
OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=ROOT_OPTIM_WRAPPERS, scope=SCOPE, locations=LOCATIONS
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", parent=ROOT_CONSTRUCTORS, scope=SCOPE, locations=LOCATIONS
)
