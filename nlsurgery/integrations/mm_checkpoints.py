"""Reading files that an mmengine Runner saved, on a torch that loads with ``weights_only``.

Such a file holds ``HistoryBuffer`` objects with numpy arrays and ``getattr`` calls in its message hub,
so torch >= 2.6 refuses it and with it ``resume``, ``load_from`` and ``init_cfg=Pretrained``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

#: Modules that numpy's array constructors live in, by version.
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _PlainHistory(HistoryBuffer):  # type: ignore[misc]
    """Stands in for ``HistoryBuffer`` while reading: takes the numbers, never functions."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_default_statistics()
        self.max_length = int(state["max_length"])
        self._log_history = np.asarray(state["_log_history"])
        self._count_history = np.asarray(state["_count_history"])
        self.__class__ = HistoryBuffer


def _history_method(owner: object, name: object) -> Callable[..., Any]:
    """Stands in for ``getattr`` while reading: the methods of ``HistoryBuffer`` and no other.

    Raises:
        pickle.UnpicklingError: Something else is asked for.
    """
    known: dict[object, Callable[..., Any]] = HistoryBuffer._statistics_methods
    HistoryBuffer()  # fills in the default methods
    if owner is _PlainHistory and name in known:
        return known[name]
    raise pickle.UnpicklingError(
        f"getattr({owner!r}, {name!r}) in a checkpoint is refused: only the statistics of mmengine's "
        f"HistoryBuffer are read"
    )


def allow_runner_checkpoints() -> None:
    """Let ``torch.load(..., weights_only=True)`` read the files of an mmengine Runner.

    Adds to torch's list of safe globals, for this process: numpy's arrays and scalars, and under the
    names of ``HistoryBuffer`` and ``getattr`` two stand-ins that take numbers and call nothing.
    ``weights_only`` stays on, and files with other code in them are still refused. Building any
    ``nlsurgery`` model from a config calls it; ``import nlsurgery`` does not.
    """
    if torch.__version__ < torch.torch_version.TorchVersion("2.6"):
        return
    # numpy 2 and numpy 1 write the same functions under different modules.
    pair = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    named: list[tuple[Any, str]] = [
        (function, f"{core}.{name}")
        for core in _NUMPY_CORES
        for function, name in zip(pair, ("_reconstruct", "scalar"), strict=True)
    ]
    named += [
        (_PlainHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_history_method, "builtins.getattr"),
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"}
    torch.serialization.add_safe_globals([*named, np.ndarray, np.dtype, *kinds])
