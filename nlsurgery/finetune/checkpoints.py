"""The state of a run on disk: tensors and plain values only, so that reading it is safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from nlsurgery.checkpoint import atomic_write, save
from nlsurgery.errors import CheckpointError
from nlsurgery.finetune.history import History

#: The file that a run goes on from, and the one it is for.
STATE_FILE = "last.pth"
MODEL_FILE = "model.safetensors"
_FORMAT = 1


class StateHook(Hook):
    """Saves the run after every epoch, and puts a saved one back before the first.

    mmengine's own checkpoints hold Python objects that torch's safe loader refuses; these hold tensors,
    numbers and strings. Every random choice of an epoch follows from (seed, epoch), so a run that goes
    on from a saved epoch repeats what an uninterrupted one does.

    Args:
        folder: The work dir.
        history: Filled from a saved state.
        fingerprint: What must not change between a run and its continuation.
        state: A state read by :func:`read_state`, or None.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        folder: Path,
        history: History,
        fingerprint: dict[str, Any],
        state: dict[str, Any] | None,
    ) -> None:
        self.folder = folder
        self.history = history
        self.fingerprint = fingerprint
        self.state = state

    def before_train(self, runner: Runner) -> None:
        """Put the saved state back."""
        if self.state is None:
            return
        runner.model.load_state_dict(self.state["model"])
        runner.optim_wrapper.load_state_dict(self.state["optimizer"])
        for scheduler, saved in zip(runner.param_schedulers, self.state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        runner.train_loop._epoch = self.state["epoch"]
        runner.train_loop._iter = self.state["iter"]
        self.state = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Save once the epoch has been scored."""
        if runner.train_loop.epoch == 0 and runner.train_loop.iter == 0:
            return
        epoch, step = runner.train_loop.epoch, runner.train_loop.iter
        state = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "epoch": epoch,
            "iter": step,
            "model": runner.model.state_dict(),
            "optimizer": runner.optim_wrapper.state_dict(),
            "schedulers": [_plain(s.state_dict()) for s in runner.param_schedulers],
            "history": self.history.to_dict(),
        }
        with atomic_write(self.folder / STATE_FILE) as part:
            torch.save(state, part)
        save(runner.model.backbone, self.folder / MODEL_FILE)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's state that are plain values."""
    kinds = (int, float, bool, str, list, tuple, type(None))
    return {key: value for key, value in state.items() if isinstance(value, kinds)}


def read_state(folder: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state a run left, None when it had saved none yet.

    Args:
        folder: The work dir.
        fingerprint: What the continuation would do; must be what the run did.

    Raises:
        CheckpointError: The file is damaged, or of a run with other settings.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = state["fingerprint"]
        _ = state["model"], state["optimizer"], state["epoch"], state["iter"], state["history"]
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be resumed from: it is cut off or no state of a run "
            f"({type(error).__name__}). Without --resume the run starts anew"
        ) from error
    for key, value in fingerprint.items():
        if before.get(key) != value:
            raise CheckpointError(
                f"{path} is of a run with {key} = {before.get(key)!r}, not {value!r}: resume with the "
                f"same settings, or choose another --work-dir"
            )
    return state
