"""Fine-tuning of operated models on the mmengine Runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlsurgery.finetune.config import FinetuneConfig
    from nlsurgery.finetune.runner import FinetuneResult, run

__all__ = ["FinetuneConfig", "FinetuneResult", "run"]


def __getattr__(name: str) -> Any:
    if name == "FinetuneConfig":
        from nlsurgery.finetune.config import FinetuneConfig

        return FinetuneConfig
    if name in ("FinetuneResult", "run"):
        from importlib import import_module

        return getattr(import_module("nlsurgery.finetune.runner"), name)
    raise AttributeError(f"module 'nlsurgery.finetune' has no attribute {name!r}")
