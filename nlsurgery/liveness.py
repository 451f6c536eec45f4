"""Does a block matter: by the data flow of an operated model, and by a gradient on a copy of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlsurgery.errors import ModelError
from nlsurgery.flow import Flow
from nlsurgery.probe import Call, Trace, first_input, flatten_output
from nlsurgery.reporting import inserted_blocks
from nlsurgery.splice import placed
from nlsurgery.walk import CHILD_NAME


def dead_blocks(model: nn.Module, trace: Trace) -> list[str]:
    """Find the inserted blocks that no output of the model depends on.

    Args:
        model: The operated model.
        trace: A forward of its meta copy that recorded the blocks.

    Returns:
        Paths of the blocks whose result nothing reads, or of whose tokens only the prefix is read.
    """
    flow = Flow(trace)
    first: dict[str, Call] = {}
    for call in trace.calls:
        first.setdefault(call.fqn, call)
    dead = []
    for host, fqn, _, _, layout, path in placed(model):
        block, around = first.get(fqn), first.get(host)
        if block is None or around is None:
            continue
        ends = [out.node for out in around.outputs if out.path == path]
        prefix = layout.num_prefix_tokens
        live = any(flow.is_live(out.node) for out in block.outputs)
        if prefix and live:
            live = not all(flow.only_prefix_read(node, prefix) for node in ends)
        if not live:
            dead.append(fqn)
    return dead


def blocks_without_gradient(
    model: nn.Module, input_size: Sequence[int] | None, example_input: object | None
) -> list[str]:
    """Find the inserted blocks that no gradient reaches, by one backward pass on a real deep copy.

    Layers of the copy that are all zero (a zero-initialised classifier, say) are made random first: they
    would stop every gradient at the first step and none later. The blocks themselves stay as they are.

    Args:
        model: An operated model with real weights; only copied.
        input_size: As in :func:`nlsurgery.inspect`.
        example_input: As in :func:`nlsurgery.inspect`.

    Raises:
        ModelError: The model has no storage, or does not run on such an input.
    """
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} lives on the meta device, where there are no gradients: give it "
            f"weights first, or leave gradient=True out"
        )
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        part, args, kwargs = first_input(copy.deepcopy(model).eval(), input_size, example_input)
        blocks = inserted_blocks(part.model)
        torch.manual_seed(0)
        _fill_zeros(part.model)
        part.model.requires_grad_(False)
        for block in blocks.values():
            block.requires_grad_(True)
        args = tuple(map(_with_history, args))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = part.run(*args, **kwargs)
        tensors = [t for _, t in flatten_output(output) if t.requires_grad]
        total = sum((t * torch.randn_like(t)).sum() for t in tensors)
        if isinstance(total, Tensor):
            total.backward()  # type: ignore[no-untyped-call]
    return [fqn for fqn, block in blocks.items() if not _has_gradient(block)]


def _with_history(value: Any) -> Any:
    """Let an input ask for a gradient, which reentrant checkpointing needs, without being a leaf.

    With it, the weights need none: a third of the work and the model's size again in memory.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.clone().requires_grad_(True).clone()
    return value


def _fill_zeros(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inserted = CHILD_NAME in name.split(".")
            if not inserted and parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02)


def _has_gradient(block: nn.Module) -> bool:
    grads: list[Any] = [p.grad for p in block.parameters() if p.grad is not None]
    return any(bool(grad.any()) for grad in grads)
