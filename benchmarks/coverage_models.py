"""Which models the coverage sweep runs on, how they are built, and how samples of them are drawn."""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of one library.

    Attributes:
        library: ``timm`` or ``torchvision``.
        name: The library's own name.
        family: The library's module that defines it, such as ``resnet``.
    """

    library: str
    name: str
    family: str

    @property
    def spec(self) -> str:
        """``library/name``."""
        return f"{self.library}/{self.name}"


def all_models() -> list[Entry]:
    """Every model of ``timm.list_models()`` and ``torchvision.models.list_models()``, sorted."""
    import timm
    import torchvision

    found = []
    for name in timm.list_models():
        home = timm.model_entrypoint(name).__module__
        found.append(Entry("timm", name, home.rpartition(".")[2]))
    for name in torchvision.models.list_models():
        home = torchvision.models.get_model_builder(name).__module__
        found.append(Entry("torchvision", name, home.removeprefix("torchvision.models.")))
    return sorted(found, key=lambda entry: (entry.library, entry.family, entry.name))


def build(entry: Entry, *, meta: bool = True, **options: Any) -> nn.Module:
    """Build a model without pretrained weights, in eval mode.

    Args:
        entry: The model.
        meta: Build on the meta device: no memory, no arithmetic. What cannot be built there is built
            with weights.
        options: More arguments of the library's own factory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if meta:
            try:
                with torch.device("meta"):
                    return _create(entry, options).eval()
            except (RuntimeError, NotImplementedError):
                pass  # some initialisers need numbers: built with weights below
        return _create(entry, options).eval()


def build_lean(entry: Entry, **options: Any) -> nn.Module:
    """Build a model with real storage of little size, in eval mode.

    All parameters of one kind of module, name and shape are one tensor, initialised once: what seven
    billion parameters compute fits this machine, what they are stored in does not.
    """
    with warnings.catch_warnings(), _pooled_parameters():
        warnings.simplefilter("ignore")
        return _create(entry, options).eval()


@contextmanager
def _pooled_parameters() -> Iterator[None]:
    pool: dict[tuple[object, ...], nn.Parameter] = {}
    mode = _InitialisedOnce()

    def share(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        key = (type(module), name, tuple(parameter.shape), parameter.dtype)
        known = pool.setdefault(key, parameter)
        if known is not parameter:
            mode.initialised.add(id(known))
        return known

    handle = register_module_parameter_registration_hook(share)
    try:
        with mode:
            yield
    finally:
        handle.remove()


class _InitialisedOnce(TorchFunctionMode):
    """Leaves out what initialisers do, in place, to a parameter that has its values."""

    def __init__(self) -> None:
        super().__init__()
        self.initialised: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or return its first argument as it is."""
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and id(args[0]) in self.initialised and name != "requires_grad_":
            return args[0]
        return func(*args, **(kwargs or {}))


def _create(entry: Entry, options: dict[str, Any]) -> nn.Module:
    model: nn.Module
    if entry.library == "timm":
        import timm

        model = timm.create_model(entry.name, pretrained=False, **options)
        return model
    import torchvision

    if entry.family.startswith(("detection", "segmentation")):
        options = {"weights_backbone": None, **options}
    if entry.name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}
    model = torchvision.models.get_model(entry.name, weights=None, **options)
    return model


def select(
    entries: Sequence[Entry],
    sample: str,
    seed: str = "",
    pattern: str = "*",
    params: Mapping[str, int] | None = None,
) -> list[Entry]:
    """Draw a sample.

    Args:
        entries: All models.
        sample: ``all``; ``family``: the smallest known of every family; ``tenth``: those whose hash with
            ``seed`` ends in one residue of ten, so that each seed draws another tenth.
        seed: Any text, such as a commit's hash.
        pattern: Only models whose ``library/name`` matches this glob.
        params: Parameter counts by ``library/name``, as far as known.
    """
    chosen = [entry for entry in entries if fnmatch.fnmatch(entry.spec, pattern)]
    if sample == "family":
        sizes = params or {}
        chosen.sort(key=lambda entry: sizes.get(entry.spec, 1 << 62))
        return list(_first_of_each_family(chosen))
    if sample == "tenth":
        return [entry for entry in chosen if _residue(f"{seed}:{entry.spec}") == 0]
    return chosen


def _residue(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10


def _first_of_each_family(entries: Sequence[Entry]) -> Iterator[Entry]:
    seen = set()
    for entry in entries:
        key = (entry.library, entry.family)
        if key not in seen:
            seen.add(key)
            yield entry
