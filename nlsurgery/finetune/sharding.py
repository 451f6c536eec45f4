"""FSDP: parameters, gradients and optimizer state dealt out to the processes by torch's ``fully_shard``.

What is saved is whole all the same: a run can go on with another number of processes, sharded or not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from torch import Tensor, nn

from nlsurgery.errors import ModelError, SurgeryError
from nlsurgery.finetune.config import FinetuneConfig
from nlsurgery.finetune.distributed import num_processes, replicate
from nlsurgery.finetune.job import Job
from nlsurgery.surgery import inspect
from nlsurgery.walk import CHILD_NAME


def check_sharding(config: FinetuneConfig) -> None:
    """Refuse to shard where it cannot be.

    Raises:
        SurgeryError: A single process, or fp16, whose loss scale would differ between the shards.
    """
    if not config.shard:
        return
    if num_processes() == 1:
        raise SurgeryError(
            "--shard deals the parameters out to several processes, but there is one: start it with "
            "torchrun --nproc-per-node N -m nlsurgery finetune ..., or leave --shard out"
        )
    if config.amp == "fp16":
        raise SurgeryError("--shard goes with --amp bf16 or off, not fp16")


def make_model(config: FinetuneConfig, job: Job, device: torch.device) -> nn.Module:
    """The Runner's model on its device: replicated or sharded where there are several processes.

    The optimizer is to be made after: sharding replaces the parameters.

    Args:
        config: The run.
        job: Its operated model.
        device: Where it trains.
    """
    model: nn.Module = job.wrap(job.network).to(device)
    if not config.shard:
        return replicate(model, device)
    shard(model, job.network, job.input_size, device.type)
    return model


def spare_copy(config: FinetuneConfig, network: nn.Module) -> nn.Module | None:
    """A whole copy on the CPU of a model that is to be sharded, in the first process; else None."""
    return copy.deepcopy(network).cpu() if config.shard and is_main_process() else None


def shard(model: nn.Module, network: nn.Module, input_size: tuple[int, ...], device: str) -> None:
    """Deal a model's parameters out to the processes, in place.

    Each process gathers the parameters of one block of a stage at a time. Inserted blocks are gathered
    by themselves: the module that holds one need not be the one that calls it.

    Args:
        model: The Runner's model.
        network: The operated model within.
        input_size: Of one sample.
        device: Type of the device, such as ``cpu``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for tensor in model.state_dict().values():
        broadcast(tensor)
    mesh = init_device_mesh(device, (num_processes(),))
    modules = dict(network.named_modules())
    names = [name for name in modules if name.rpartition(".")[2] == CHILD_NAME]
    try:
        stages = inspect(network, input_size=input_size).stages
    except ModelError:
        stages = ()  # a recipe for a part of it alone: the rest is gathered at once
    blocks = {name for stage in stages for name in stage.blocks}
    names += sorted(blocks - {""}, key=lambda name: (-name.count("."), name))
    for name in names:
        if any(True for _ in modules[name].parameters()):
            fully_shard(modules[name], mesh=mesh)
    # By default the outermost parameters stay gathered after a forward without a backward, as in scoring.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _is_sharded(value: object) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def full(tensor: Tensor) -> Tensor:
    """A tensor without its graph, gathered if it is sharded; each process must ask for it then."""
    value: Any = tensor.detach()
    gathered: Tensor = value.full_tensor() if _is_sharded(value) else value
    return gathered


def whole(value: Any) -> Any:
    """Gather every sharded tensor in a structure of dicts and lists; each process must ask for it.

    Returns:
        The same structure with whole tensors on the CPU, which the first process alone keeps; what
        was not sharded is the same object.
    """
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    if not _is_sharded(value):
        return value
    gathered = full(value)
    return gathered.cpu() if is_main_process() else None


def shards_like(tensors: Mapping[str, Any], likes: Mapping[str, Any]) -> dict[str, Any]:
    """Deal whole tensors out as those of the same name are; what is not sharded stays as it is."""
    return {key: _shard_like(value, likes.get(key)) for key, value in tensors.items()}


def _shard_like(value: Any, like: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    if not _is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def optimizer_shards(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Deal an optimizer's saved state out as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dealt = {
        index: {key: _shard_like(value, parameters[index]) for key, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": dealt}


class ShardedEMAHook(EMAHook):
    """mmengine's EMA of a sharded model, whose average is sharded alike.

    mmengine copies the model, which a sharded one cannot be; what it copies here is a tree of modules
    with the same parameters and buffers, which runs nothing.
    """

    def before_run(self, runner: Runner) -> None:
        """Make the average."""
        options = {key: value for key, value in self.ema_cfg.items() if key != "type"}
        self.src_model = runner.model
        self.ema_model = ExponentialMovingAverage(_skeleton(runner.model), **options)


def _skeleton(module: nn.Module) -> nn.Module:
    """A tree of bare modules that hold a module's own parameters and buffers."""
    bare = nn.Module()
    for name, parameter in module._parameters.items():
        bare.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        bare.register_buffer(name, buffer, persistent=persistent)
    for name, child in module._modules.items():
        bare.add_module(name, None if child is None else _skeleton(child))
    return bare
