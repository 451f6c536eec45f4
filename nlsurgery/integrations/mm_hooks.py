"""Hooks for mmengine's Runner: how far the gates have opened, and what the blocks attend to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from nlsurgery.errors import ModelError
from nlsurgery.integrations.mm_operated import Operated, blocks_of
from nlsurgery.integrations.mm_plugins import all_blocks
from nlsurgery.integrations.mm_surgery import BACKBONE
from nlsurgery.registry import HOOKS
from nlsurgery.viz.capture import AttentionRows, grid_points, read_rows
from nlsurgery.viz.figure import block_figure
from nlsurgery.viz.images import Picture

Phase = Literal["train", "val"]


def _blocks(runner: Any) -> dict[str, nn.Module]:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    blocks = all_blocks(model)
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} holds no block of nlsurgery to watch; build it with "
            f"nlsurgery.Surgery or plugins=, or take the hook out"
        )
    return blocks


def _check_interval(interval: int) -> int:
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be a number of iterations from 1 on, but got {interval!r}")
    return interval


@HOOKS.register_module()  # type: ignore[untyped-decorator]
class GateHook(Hook):  # type: ignore[misc]
    """Write the mean |γ| of every block to the visualizer's backends: ``gate/<path of the block>``.

    A gate is 0 at init; one that stays there means a block that does not learn.
    """

    def __init__(self, interval: int = 50) -> None:
        """Set the schedule.

        Args:
            interval: Training iterations between two records; the last one is recorded too.

        Raises:
            ValueError: It is not a positive number.
        """
        self.interval = _check_interval(interval)

    def before_train(self, runner: Any) -> None:
        """Record the gates that training starts from."""
        self._record(runner, runner.iter)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Record the gates if it is time."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self._record(runner, runner.iter + 1)

    def _record(self, runner: Any, step: int) -> None:
        gates = {
            f"gate/{path}": float(block.gate.detach().abs().mean())  # type: ignore[union-attr,operator]
            for path, block in _blocks(runner).items()
        }
        runner.visualizer.add_scalars(gates, step=step)
        text = ", ".join(
            f"{path.removeprefix('gate/')} {value:.2e}" for path, value in gates.items()
        )
        runner.logger.info(f"gates after {step} iterations (mean |gamma|): {text}")


@HOOKS.register_module()  # type: ignore[untyped-decorator]
class AttentionHook(Hook):  # type: ignore[misc]
    """Record what the blocks attend to, for the first sample of a batch, to the visualizer's backends.

    ``attention_entropy/<block>``: the mean entropy of the attention of a grid of queries, over log M: 1
    is uniform, 0 a single key. Where weights are no distribution (``dot_product``, ``concatenation``),
    their absolute values are taken as one. ``attention/<block>``: a picture, of clips with a line of
    frames per query.
    The maps are those of the forward that runs anyway; nothing is run twice.
    """

    def __init__(
        self, interval: int = 500, *, phase: Phase = "train", side: int = 2, pictures: bool = True
    ) -> None:
        """Set the schedule.

        Args:
            interval: Training iterations between two records; with ``phase='val'``, validations.
            phase: Look at training batches, or at the first batch of a validation.
            side: Queries along each axis of the picture, ``side`` squared in all.
            pictures: Draw, or record the entropy alone.

        Raises:
            ValueError: An option that is not allowed.
        """
        if phase not in ("train", "val"):
            raise ValueError(f"phase must be 'train' or 'val', but got {phase!r}")
        self.interval = _check_interval(interval)
        self.phase, self.pictures = phase, pictures
        self.points = grid_points(side)
        self._watch: _Watch | None = None
        self._validations = 0

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Start to watch if it is time."""
        if self.phase == "train" and self.every_n_train_iters(runner, self.interval):
            self._start(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Record what was seen."""
        self._finish(runner, runner.iter + 1)

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Start to watch at the first batch."""
        if self.phase == "val" and batch_idx == 0:
            self._validations += 1
            if self._validations % self.interval == 0:
                self._start(runner)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Record what was seen."""
        self._finish(runner, runner.iter)

    def _start(self, runner: Any) -> None:
        blocks = _blocks(runner)
        if is_main_process():
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            self._watch = _Watch(_entry(model), blocks)

    def _finish(self, runner: Any, step: int) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.stop()
        with torch.no_grad():
            scalars = {}
            for path, x in watch.seen.items():
                block = watch.blocks[path]
                value = attention_entropy(block, x)
                if value is not None:
                    scalars[f"attention_entropy/{path}"] = value
                if self.pictures and watch.image is not None:
                    self._draw(runner, path, block, x, watch.image, step)
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)
        else:
            runner.logger.warning(
                "nlsurgery.AttentionHook saw no attention map: no block has one, or the model is "
                "compiled and its hooks do not run"
            )

    def _draw(
        self, runner: Any, path: str, block: nn.Module, x: Tensor, image: Tensor, step: int
    ) -> None:
        rows = read_rows(path, block, _as_weights(block, x), self.points)
        if isinstance(rows, AttentionRows) and len(rows.query_size) == image.ndim - 1:
            figure = block_figure(rows, _to_picture(image), self.points)
            figure.canvas.draw()
            canvas: NDArray[np.uint8] = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
            name = f"attention/{path}".replace("/", "_")
            runner.visualizer.add_image(name, np.ascontiguousarray(canvas[..., :3]), step=step)


class _Watch:
    """The inputs of blocks during one forward: the first sample of each, and the model's image."""

    def __init__(self, entry: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        self.blocks = dict(blocks)
        self.seen: dict[str, Tensor] = {}
        self.image: Tensor | None = None
        self._handles = [entry.register_forward_pre_hook(self._see_image, with_kwargs=True)]
        for path, block in self.blocks.items():
            self._handles.append(block.register_forward_pre_hook(self._see(path)))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, path: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.seen[path] = args[0][:1].detach()

        return keep

    def _see_image(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim in (4, 5) and value.shape[1] in (1, 3):
                self.image = value[0].detach()
                return


def _entry(model: nn.Module) -> nn.Module:
    """The module whose input is the image as the blocks' host sees it."""
    for module in model.modules():
        if isinstance(module, Operated) and any(True for _ in blocks_of(module)):
            inner = getattr(module, BACKBONE, module)
            return inner if isinstance(inner, nn.Module) else module
    inner = getattr(model, BACKBONE, model)
    return inner if isinstance(inner, nn.Module) else model


def attention_entropy(block: nn.Module, x: Tensor, *, num_queries: int = 64) -> float | None:
    """The mean entropy of a block's attention, as a share of that of the uniform one.

    Args:
        block: A block, with or without an attention map.
        x: (1, C, *spatial), what it was called with.
        num_queries: How many positions, evenly spread, to take as queries.

    Returns:
        In [0, 1]; None where the block has no map over more than one key.
    """
    attention = getattr(block, "attention", None)
    if not callable(attention):
        return None
    num_positions = math.prod(x.shape[2:])
    queries = torch.linspace(0, num_positions - 1, min(num_queries, num_positions))
    weights = attention(_as_weights(block, x), queries=queries.round().long().to(x.device))
    share = weights[0].float().abs()
    num_keys = share.shape[-1]
    if num_keys < 2:
        return None
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    entropy = -(share * share.clamp_min(torch.finfo(torch.float32).tiny).log()).sum(-1)
    return float(entropy.mean() / math.log(num_keys))


def _as_weights(block: nn.Module, x: Tensor) -> Tensor:
    """``x`` in the dtype of the block's weights: outside of autocast they must agree."""
    return x.to(next(block.parameters()).dtype)


def _to_picture(image: Tensor) -> Picture:
    """A normalised image (C, H, W), or clip (C, T, H, W), its values spread over the whole range."""
    values = image.float().cpu()
    low, high = values.amin(), values.amax()
    scaled = ((values - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)
    frames = scaled.unsqueeze(1) if image.ndim == 3 else scaled
    rgb = frames.expand(3, -1, -1, -1).permute(1, 2, 3, 0).numpy()
    pictures = tuple(Image.fromarray(frame) for frame in rgb)
    return pictures[0] if image.ndim == 3 else pictures
