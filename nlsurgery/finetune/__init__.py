"""Fine-tuning of operated models on the mmengine Runner."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlsurgery.finetune.config import FinetuneConfig
    from nlsurgery.finetune.dry_run import Estimate, estimate
    from nlsurgery.finetune.training import FinetuneResult, run

_HOME_OF = {
    "Estimate": "dry_run",
    "FinetuneConfig": "config",
    "FinetuneResult": "training",
    "estimate": "dry_run",
    "run": "training",
}

__all__ = ["Estimate", "FinetuneConfig", "FinetuneResult", "estimate", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"nlsurgery.finetune.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'nlsurgery.finetune' has no attribute {name!r}")
