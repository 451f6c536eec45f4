"""Fine-tuning of operated models on the mmengine Runner."""

from __future__ import annotations

import pickle
import time
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


def _import_formatter() -> None:
    """Import yapf, which mmengine needs, however many processes do it at once.

    Its first import on a machine writes a grammar file; a process that reads it half written tries again.
    """
    for attempt in range(50):
        try:
            import_module("yapf")
        except (EOFError, pickle.UnpicklingError):
            if attempt == 49:
                raise
            time.sleep(0.1)
        else:
            return


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        _import_formatter()
        return getattr(import_module(f"nlsurgery.finetune.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'nlsurgery.finetune' has no attribute {name!r}")
