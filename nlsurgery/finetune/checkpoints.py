"""The state of a run on disk: tensors and plain values only, so that reading it is safe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from nlsurgery.checkpoint import atomic_write, save
from nlsurgery.errors import CheckpointError
from nlsurgery.finetune.history import History
from nlsurgery.finetune.sharding import optimizer_shards, shards_like, whole
from nlsurgery.finetune.stopping import Interrupted, StopSignal

#: The file that a run goes on from, and those it is for.
STATE_FILE = "last.pth"
MODEL_FILE = "model.safetensors"
BEST_FILE = "best.safetensors"
_FORMAT = 1


class StateHook(Hook):
    """Saves the run, and puts a saved one back before it goes on.

    mmengine's own checkpoints hold Python objects that torch's safe loader refuses; these hold tensors,
    numbers and strings. Every random choice follows from (seed, epoch, step), so a run that goes on
    repeats what an uninterrupted one does.

    Args:
        folder: The work dir.
        history: Filled from a saved state.
        fingerprint: What must not change between a run and its continuation.
        state: A state read by :func:`read_state`, or None.
        every: Steps between two saves inside an epoch; None for none.
        stop: Tells that the process was asked to end.
        spare: Of a sharded run, a whole copy of its network to save weights with (first process).
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        folder: Path,
        history: History,
        fingerprint: Mapping[str, Any],
        state: dict[str, Any] | None,
        every: int | None,
        stop: StopSignal,
        spare: nn.Module | None = None,
    ) -> None:
        self.folder = folder
        self.history = history
        self.fingerprint = dict(fingerprint)
        self.state = state
        self.every = every
        self.stop = stop
        self.spare = spare

    def before_run(self, runner: Runner) -> None:
        """Put the saved state back."""
        if self.state is None:
            return
        state, self.state = self.state, None
        model = _inner(runner)
        _load(model, state["model"])
        parameters = dict(model.named_parameters())
        for name, grad in shards_like(state["grads"], parameters).items():
            parameters[name].grad = grad.to(parameters[name].device)
        optimizer = runner.optim_wrapper.optimizer
        runner.optim_wrapper.load_state_dict(optimizer_shards(state["optimizer"], optimizer))
        schedulers = runner.param_schedulers or []
        for scheduler, saved in zip(schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        averaged = _averaged(runner)
        if averaged is not None:
            _load(averaged, state["ema"])
        runner.train_loop._epoch, runner.train_loop._iter = state["epoch"], state["iter"]
        done = state["iter"] - state["epoch"] * len(runner.train_dataloader)
        runner.train_dataloader.sampler.skip = done

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save now and then, and before the process ends on request."""
        step = runner.iter + 1
        stopping = self.stop.is_set()
        if stopping or (self.every is not None and step % self.every == 0):
            self.write(runner, step)
        if stopping:
            raise Interrupted(step, saved=True)

    def after_train_epoch(self, runner: Runner) -> None:
        """Save before the epoch is scored."""
        self.write(runner, runner.iter)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """End on request; what was trained is saved already."""
        if self.stop.is_set():
            raise Interrupted(runner.iter, saved=runner.iter > 0)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Save once the epoch has been scored: the model files, and then the state that has the score.

        A run that is killed between the two goes on from the state before the score, scores again and
        writes the model files again; the other way round they would stay those of the epoch before.
        """
        if runner.iter == 0:
            return
        averaged = _averaged(runner)
        trained: Any = _inner(runner) if averaged is None else averaged.module
        network: nn.Module = trained.backbone
        weights = whole(network.state_dict())
        if is_main_process():
            if self.spare is not None:
                self.spare.load_state_dict(weights)
                network = self.spare
            save(network, self.folder / MODEL_FILE)
            if self.history.stale_epochs == 0:
                save(network, self.folder / BEST_FILE)
        self.write(runner, runner.iter)

    def write(self, runner: Runner, step: int) -> None:
        """Write the state after ``step`` steps; the file before it stays whole until this one is."""
        state = whole(self._state(runner, step))
        if is_main_process():
            write_state(state, self.folder / STATE_FILE)
        barrier()

    def _state(self, runner: Runner, step: int) -> dict[str, Any]:
        model, averaged = _inner(runner), _averaged(runner)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        unfinished = step % runner.optim_wrapper._accumulative_counts != 0
        return {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "epoch": runner.epoch,
            "iter": step,
            "model": model.state_dict(),
            "ema": None if averaged is None else averaged.state_dict(),
            "grads": grads if unfinished else {},
            "optimizer": runner.optim_wrapper.state_dict(),
            "schedulers": [_plain(s.state_dict()) for s in runner.param_schedulers or ()],
            "history": self.history.to_dict(),
        }


def _inner(runner: Runner) -> nn.Module:
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


def _load(model: nn.Module, state: Mapping[str, Any]) -> None:
    model.load_state_dict(shards_like(state, model.state_dict()))


def _averaged(runner: Runner) -> Any:
    """The averaged model, None in a run without one."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            return hook.ema_model
    return None


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's state that are plain values."""
    kinds = (int, float, bool, str, list, tuple, dict, type(None))
    return {
        key: dict(value) if isinstance(value, dict) else value
        for key, value in state.items()
        if isinstance(value, kinds)
    }


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state whole or not at all.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written.
    """
    with atomic_write(path) as part:
        try:
            torch.save(dict(state), part)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} cannot be written (is the disk full?): {str(error).splitlines()[0]}. What was "
                f"saved before is whole; free some space and --resume"
            ) from error


def clear_leftovers(folder: Path) -> None:
    """Take away the half-written files of a process that was killed."""
    for name in (STATE_FILE, MODEL_FILE, BEST_FILE):
        for part in folder.glob(f".{name}.*.part"):
            part.unlink(missing_ok=True)


def read_state(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
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
        needed = ("model", "ema", "grads", "optimizer", "schedulers", "epoch", "iter", "history")
        _ = [state[key] for key in needed]
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be resumed from: it is cut off, or is no state of a run "
            f"({type(error).__name__}). Without --resume the run starts anew"
        ) from error
    for key, value in fingerprint.items():
        if before.get(key) != value:
            raise CheckpointError(
                f"{path} is of a run with {key} = {_short(before.get(key))}, not {_short(value)}: "
                f"resume with the same settings, or choose another --work-dir"
            )
    return state


def _short(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, Tensor) else value)
    return text if len(text) <= 120 else text[:117] + "..."
