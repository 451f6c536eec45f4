"""Values of tensors that follow from shapes alone, on the meta device, where no tensor has a value.

Some models compute positions from the input's size and ask for the largest: on the meta device that
is an error, though it depends on no pixel and no weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: Values of larger tensors are not formed.
MOST_VALUES = 1 << 20


class Constants:
    """Remembers how tensors were made that read no input, and forms their values when asked."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Any, tuple[Any, ...], dict[str, Any], int]] = {}
        self._written: set[int] = set()

    def note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Iterable[Tensor]
    ) -> None:
        """Remember an operation none of whose tensors depends on the input.

        Args:
            func: The operator.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            made: The tensors it returned.
        """
        name = func._schema.name.removeprefix("aten::")
        for position, tensor in enumerate(made):
            if func._schema.is_mutable:
                self._written.add(storage_key(tensor))
            elif torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in name:
                self._made[id(tensor)] = (tensor, func, args, kwargs, position)

    def value(self, tensor: Tensor) -> Tensor | None:
        """The values of a meta tensor on the CPU, ``None`` where they are not known."""
        if tensor.device.type != "meta":
            return tensor
        made = self._made.get(id(tensor))
        if made is None or storage_key(tensor) in self._written or tensor.numel() > MOST_VALUES:
            return None
        _, func, args, kwargs, position = made
        unknown = False

        def known(item: Any) -> Any:
            nonlocal unknown
            if isinstance(item, torch.device):
                return torch.device("cpu")
            if not isinstance(item, Tensor):
                return item
            value = None if unknown else self.value(item)
            unknown = unknown or value is None
            return value

        args, kwargs = tree_map(known, args), tree_map(known, kwargs)
        if unknown:
            return None
        out = func(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[position]


def storage_key(tensor: Tensor) -> int:
    """What tells one piece of memory from another, shared by the views of it."""
    key: int = tensor.untyped_storage()._cdata
    return key
