"""The only module that changes a model: blocks in, blocks out, all or nothing.

Blocks become children of their host under one fixed name and are run by a forward hook that looks the
child up on the module it is called with. The hook holds no reference, so copies run their own blocks;
hosts keep class, index, attributes and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nlsurgery.blocks.layout import Layout, from_channels_first, to_channels_first
from nlsurgery.errors import ModelError, VerifyError
from nlsurgery.sites import Record, Site, find_hook
from nlsurgery.walk import CHILD_NAME, HOOK_MARK, OutputPath

torch.fx.wrap("to_channels_first")
torch.fx.wrap("from_channels_first")

#: On a hooked container that cannot take a child: the path of the descendant that holds it.
OWNER_NAME = "_nlsurgery_owner"
#: On a residual block with blocks inside: the paths of the sub-modules that host them.
INNER_NAME = "_nlsurgery_inner"


class Inserted(nn.Module):
    """The blocks at one host: its children ``0``, ``1``, ... run one after the other.

    Attributes:
        places: For each block the layout of its feature map, and the keys and indices that lead to it
            in the host's output. Blocks on parallel branches of one host have different paths.
        records: What is known of each block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.places: tuple[tuple[Layout, OutputPath], ...] = ()
        self.records: tuple[Record, ...] = ()

    def add(self, block: nn.Module, record: Record, layout: Layout, path: OutputPath = ()) -> None:
        """Stack one more block on top."""
        self.add_module(str(len(self._modules)), block)
        self.places += ((layout, path),)
        self.records += (record,)

    def drop_last(self) -> None:
        """Take the topmost block off again."""
        del self._modules[str(len(self._modules) - 1)]
        self.places = self.places[:-1]
        self.records = self.records[:-1]

    def forward(self, output: Any) -> Any:
        """Run the blocks on the host's output.

        Args:
            output: What the host returned: a tensor in ``layout``, or a structure that holds it.

        Returns:
            The same structure with the feature map replaced.
        """
        if not self.active:
            return output
        blocks = list(self._modules.values())
        start = 0
        while start < len(blocks):
            place = self.places[start]
            end = start + 1
            while end < len(blocks) and self.places[end] == place:
                end += 1
            layout, path = place
            feature = _picked(output, path)
            output = _replaced(output, path, _run(blocks[start:end], feature, layout))
            start = end
        return output


def _run(blocks: Sequence[nn.Module | None], feature: Tensor, layout: Layout) -> Tensor:
    x, prefix = to_channels_first(feature, layout)
    for block in blocks:
        x = block(x)  # type: ignore[misc]
    return from_channels_first(x, prefix, layout, feature)


def _picked(output: Any, path: OutputPath) -> Any:
    for key in path:
        output = output[key]
    return output


def _replaced(output: Any, path: OutputPath, value: Tensor) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    inner = _replaced(output[key], rest, value)
    if isinstance(output, Mapping):
        changed = output.copy()  # type: ignore[attr-defined]
        changed[key] = inner
        return changed
    items = [inner if index == key else item for index, item in enumerate(output)]
    if hasattr(output, "_fields"):
        return type(output)(*items)
    return type(output)(items)


def run_inserted(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of every host: run the blocks that live on it."""
    owner = module.__dict__.get(OWNER_NAME)
    holder = module if owner is None else module.get_submodule(owner)
    return holder._modules[CHILD_NAME](output)  # type: ignore[misc]


def keep_inner_hooks(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a residual block with blocks inside: see that their hooks are still there.

    ``convert_sync_batchnorm`` and the like replace a BatchNorm and carry its children over, but not its
    hooks: the hook is put back. Where the child itself is gone (fused, reparametrised), it raises.
    """
    if torch.compiler.is_compiling():
        return
    for path in module.__dict__[INNER_NAME]:
        host = _submodule(module, path)
        if host is not None and find_hook(host) is not None:
            continue
        if host is None or CHILD_NAME not in host._modules:
            raise VerifyError(
                f"the block inserted at {path!r} of {type(module).__name__} is gone: that module was "
                f"replaced (fused or reparametrised). Fuse first and operate after, or insert at "
                f"'output' of the block"
            )
        _hook(host)


def lost_places(model: nn.Module) -> list[str]:
    """Paths of modules that held inserted blocks and were replaced, as fusing does."""
    lost = []
    for fqn, module in model.named_modules():
        for path in module.__dict__.get(INNER_NAME, ()):
            host = _submodule(module, path)
            if host is None or CHILD_NAME not in host._modules:
                lost.append(f"{fqn}.{path}" if fqn else path)
    return lost


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


setattr(run_inserted, HOOK_MARK, True)
setattr(keep_inner_hooks, HOOK_MARK, True)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(run_inserted, prepend=True)


def splice(model: nn.Module, work: Sequence[tuple[Site, nn.Module, Record]]) -> None:
    """Put blocks into a model. On any error the model is as it was.

    Args:
        model: The model, changed in place.
        work: Sites with the block to add to each, in order.

    Raises:
        ModelError: A host has an attribute of the child's name already.
    """
    done: list[tuple[Site, Inserted, bool]] = []
    try:
        for site, block, record in work:
            inserted, fresh = _inserted_at(model, site)
            if fresh:
                done.append((site, inserted, True))
            inserted.add(block, record, site.layout, site.path)
            if not fresh:
                done.append((site, inserted, False))
    except BaseException:
        for site, inserted, fresh in reversed(done):
            if fresh:
                _withdraw(model, site.host)
            else:
                inserted.drop_last()
        raise


def _inserted_at(model: nn.Module, site: Site) -> tuple[Inserted, bool]:
    host = model.get_submodule(site.host)
    holder = host if site.owner is None else host.get_submodule(site.owner)
    existing = holder._modules.get(CHILD_NAME)
    if isinstance(existing, Inserted) and find_hook(host) is not None:
        return existing, False
    if hasattr(holder, CHILD_NAME):
        raise ModelError(f"{site.host or 'the model'} has an attribute {CHILD_NAME!r} of its own")
    inserted = Inserted()
    inserted.training = host.training
    holder.add_module(CHILD_NAME, inserted)
    if site.owner is not None:
        host.__dict__[OWNER_NAME] = site.owner
    _hook(host)
    if site.guard is not None:
        _guard(model.get_submodule(site.guard), site.host.removeprefix(site.guard).lstrip("."))
    return inserted, True


def _guard(block: nn.Module, path: str) -> None:
    if INNER_NAME not in block.__dict__:
        block.__dict__[INNER_NAME] = ()
        block.register_forward_pre_hook(keep_inner_hooks, prepend=True)
    block.__dict__[INNER_NAME] += (path,)


def _withdraw(model: nn.Module, host_fqn: str) -> None:
    """Take the child and its hook off one host."""
    host = model.get_submodule(host_fqn)
    owner = host.__dict__.pop(OWNER_NAME, None)
    holder = host if owner is None else host.get_submodule(owner)
    holder._modules.pop(CHILD_NAME, None)
    key = find_hook(host)
    if key is not None:
        del host._forward_hooks[key]
    for module in model.modules():
        if INNER_NAME in module.__dict__:
            _drop_guard(module, host)


def _drop_guard(block: nn.Module, host: nn.Module) -> None:
    rest = tuple(p for p in block.__dict__[INNER_NAME] if _submodule(block, p) is not host)
    if rest:
        block.__dict__[INNER_NAME] = rest
        return
    del block.__dict__[INNER_NAME]
    for key in [k for k, h in block._forward_pre_hooks.items() if getattr(h, HOOK_MARK, False)]:
        del block._forward_pre_hooks[key]


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Inserted]]:
    """Yield (host fqn, host, its blocks) for every operated host, in module order."""
    for fqn, module in model.named_modules():
        if CHILD_NAME in fqn.split("."):
            continue
        if find_hook(module) is None:
            if OWNER_NAME not in module.__dict__ and not isinstance(
                module._modules.get(CHILD_NAME), Inserted
            ):
                continue
            if OWNER_NAME not in module.__dict__ and _is_owned(model, fqn):
                continue
        owner = module.__dict__.get(OWNER_NAME)
        holder = module if owner is None else module.get_submodule(owner)
        inserted = holder._modules.get(CHILD_NAME)
        if isinstance(inserted, Inserted):
            yield fqn, module, inserted


class Placed(NamedTuple):
    """One inserted block of a model.

    Attributes:
        host: fqn of the module whose output it changes.
        fqn: Its own path.
        block: The block.
        record: What is known of it.
        layout: Layout of its feature map.
        path: The keys and indices that lead to the feature map in the host's output.
    """

    host: str
    fqn: str
    block: nn.Module | None
    record: Record
    layout: Layout
    path: OutputPath


def placed(model: nn.Module) -> Iterator[Placed]:
    """Yield every inserted block, in module order."""
    paths = {id(module): fqn for fqn, module in model.named_modules()}
    for host, _, inserted in hosts(model):
        rows = zip(inserted._modules.items(), inserted.records, inserted.places, strict=True)
        for (name, block), record, (layout, path) in rows:
            yield Placed(host, f"{paths[id(inserted)]}.{name}", block, record, layout, path)


def _is_owned(model: nn.Module, fqn: str) -> bool:
    """Whether a module holds the child of a container above it."""
    parts = fqn.split(".")
    for cut in range(len(parts)):
        above = model.get_submodule(".".join(parts[:cut]))
        if above.__dict__.get(OWNER_NAME) == ".".join(parts[cut:]):
            return True
    return False


def withdraw_all(model: nn.Module) -> None:
    """Take every inserted block out again: children, hooks and marks."""
    for fqn in [fqn for fqn, _, _ in hosts(model)]:
        _withdraw(model, fqn)
    for module in model.modules():
        if INNER_NAME in module.__dict__:
            del module.__dict__[INNER_NAME]
            pre = module._forward_pre_hooks
            for key in [k for k, hook in pre.items() if getattr(hook, HOOK_MARK, False)]:
                del pre[key]
