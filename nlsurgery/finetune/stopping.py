"""Ending on request: SIGTERM sets a flag that the run looks at between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info


class Interrupted(Exception):  # noqa: N818
    """A run that was asked to end.

    Args:
        step: Steps done.
        saved: Whether they are saved.
    """

    def __init__(self, step: int, *, saved: bool) -> None:
        super().__init__(step)
        self.step = step
        self.saved = saved


class StopSignal:
    """Listens for SIGTERM inside a ``with`` block of the main thread."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._listening = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._listening = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._listening:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
            self._listening = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def is_set(self) -> bool:
        """Whether any of the processes was asked to end."""
        if get_dist_info()[1] == 1:
            return self._asked
        asked = torch.tensor(float(self._asked))
        all_reduce(asked, op="max")
        return bool(asked)
