"""BatchNorm over the whole batch of several CPU processes, as torch's SyncBatchNorm does on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode


@contextmanager
def shared_statistics(device: torch.device) -> Iterator[None]:
    """Normalise training batches by the statistics of all processes inside a ``with`` block.

    Torch has such norms for CUDA alone. Here every call of ``F.batch_norm`` in training is computed
    over all processes, whichever class of norm makes it, so that several processes give the numbers of
    one. Nothing changes in a single process or on CUDA.

    Args:
        device: Where the model trains.
    """
    if device.type != "cpu" or not distributed.is_initialized():
        yield
        return
    group = distributed.new_group(backend="gloo")
    try:
        with _SharedBatchNorm(group):
            yield
    finally:
        distributed.destroy_process_group(group)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


def _mean_over(x: Tensor, group: Any) -> Tensor:
    total: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return total / distributed.get_world_size(group)


class _SharedBatchNorm(TorchFunctionMode):
    """Answers ``F.batch_norm`` in training; every other call goes its way."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            bound = _bind(*args, **(kwargs or {}))
            if bound["training"]:
                return batch_norm_over(self.group, **bound)
        return func(*args, **(kwargs or {}))


def _bind(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """The arguments of ``F.batch_norm`` by name."""
    return {
        "x": input, "running_mean": running_mean, "running_var": running_var, "weight": weight,
        "bias": bias, "training": training, "momentum": momentum, "eps": eps,
    }  # fmt: skip


def batch_norm_over(
    group: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise by the mean and variance over all processes; each must hold as many samples.

    Args:
        group: The processes.
        x: (B, C, *spatial), this process's part.
        running_mean: (C,), updated in place.
        running_var: (C,), updated in place with the unbiased variance.
        weight: (C,).
        bias: (C,).
        training: Always True here.
        momentum: Share of the new statistics.
        eps: Added to the variance.
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    values = x if x.dtype == torch.float64 else x.float()
    mean = _mean_over(values.mean(dims), group)
    centred = values - mean.view(shape)
    variance = _mean_over(centred.square().mean(dims), group)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    out = centred * scale.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1] * distributed.get_world_size(group)
        with torch.no_grad():
            unbiased = variance * (count / max(1, count - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    result: Tensor = out.to(x.dtype)
    return result
