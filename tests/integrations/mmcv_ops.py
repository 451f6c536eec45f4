"""mmcv's compiled operators, as far as tests need them, from torchvision.

``mmcv-lite`` has none, and mmdet, mmseg and mmaction2 import ``mmcv.ops``. Calling an operator that is
not here raises.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torchvision
from torch import Tensor


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    return torchvision.ops.nms(boxes, scores, iou_threshold)


class _Operators(types.ModuleType):
    nms = staticmethod(_nms)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"mmcv-lite has no operator {name}")

        return missing


def provide() -> None:
    """Put the operators where mmcv looks for its compiled ones, unless they are installed."""
    name = "mmcv._ext"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = _Operators(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
