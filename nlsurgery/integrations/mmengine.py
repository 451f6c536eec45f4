"""The OpenMMLab plugin: importing this module registers everything in the scope ``nlsurgery``.

``docs/openmmlab.md`` says how to use it from configs.
"""

from __future__ import annotations

from nlsurgery.integrations.mm_checkpoints import allow_runner_checkpoints
from nlsurgery.integrations.mm_hooks import AttentionHook, GateHook
from nlsurgery.integrations.mm_hub import HubBackbone, HubClassifier
from nlsurgery.integrations.mm_operated import Operated
from nlsurgery.integrations.mm_optim import CPUAmpOptimWrapper, OptimWrapperConstructor
from nlsurgery.integrations.mm_plugins import PluginLayer, Stack
from nlsurgery.integrations.mm_surgery import build_surgery

__all__ = [
    "AttentionHook",
    "CPUAmpOptimWrapper",
    "GateHook",
    "HubBackbone",
    "HubClassifier",
    "Operated",
    "OptimWrapperConstructor",
    "PluginLayer",
    "Stack",
    "allow_runner_checkpoints",
    "build_surgery",
]
