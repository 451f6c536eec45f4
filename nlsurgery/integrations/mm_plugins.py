"""Blocks as layers of mmengine: every block type under its CamelCase name, as ``plugins=`` take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mmengine.registry import Registry
from torch import Tensor, nn

from nlsurgery.blocks import BLOCK_TYPES, block_type
from nlsurgery.errors import BlockError, RecipeError, close_names
from nlsurgery.integrations.mixed import Mixed, mixed_class
from nlsurgery.integrations.mm_checkpoints import allow_runner_checkpoints
from nlsurgery.integrations.mm_operated import blocks_of
from nlsurgery.recipe import check_block
from nlsurgery.registry import MODELS

#: How the attributes that hold plugin layers begin, so that one custom key reaches all of them.
ABBREVIATION = "nlsurgery"


class PluginLayer(Mixed, nn.Module):
    """Mixed into the class of a block built by mmengine: ``init_weights`` restores the identity."""

    def init_weights(self) -> None:
        """Restore the block's own init, which is the identity: mmengine has just undone it."""
        self.reset_parameters()  # type: ignore[operator]


def layer_name(name: str) -> str:
    """The CamelCase name of a block type: ``non_local`` is ``NonLocal``."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def register_block_layers(registry: Registry) -> None:
    """Register a layer for every block type that has none yet.

    Args:
        registry: Where to.
    """
    for name in BLOCK_TYPES:
        if layer_name(name) not in registry.module_dict:
            registry.register_module(layer_name(name), module=_layer_class(name))


@cache
def _layer_class(name: str) -> type[Any]:
    """A class whose call builds a block: ``Class(in_channels=C, dims=2, **options)``."""

    def build(cls: type[Any], in_channels: int, dims: int = 2, **options: Any) -> nn.Module:
        return build_layer(name, in_channels, dims, options)

    namespace = {
        "__new__": build,
        "__doc__": f"The block ``{name}`` ({block_type(name).source}) as a plugin layer.",
        "__module__": __name__,
        "_abbr_": f"{ABBREVIATION}_{name}",
    }
    return type(layer_name(name), (nn.Module,), namespace)


def build_layer(name: str, in_channels: int, dims: int, options: Mapping[str, Any]) -> nn.Module:
    """Build a block that keeps its identity through mmengine's ``init_weights``.

    Args:
        name: Block type.
        in_channels: C of its input (B, C, *spatial).
        dims: Spatial dimensions of its input: 1, 2 or 3.
        options: As in a recipe's ``block``.

    Raises:
        BlockError: An option that the block does not have, or a value not allowed.
    """
    allow_runner_checkpoints()
    entry = block_type(name)
    try:
        checked = check_block({"type": name, **options}, f"nlsurgery.{layer_name(name)}")
    except RecipeError as error:
        raise BlockError(str(error)) from error
    checked.pop("type")
    block = entry.build(in_channels, dims=dims, **checked)
    block.__class__ = mixed_class(PluginLayer, type(block))
    return block


@MODELS.register_module()  # type: ignore[untyped-decorator]
class Stack(nn.Sequential):
    """Several blocks as one plugin layer, one after the other.

    mmsegmentation 1.2 runs only the last of two plugins at one place; this is one plugin.
    """

    _abbr_ = f"{ABBREVIATION}_stack"

    def __init__(
        self, in_channels: int, blocks: Sequence[Mapping[str, Any]], dims: int = 2
    ) -> None:
        """Build the blocks.

        Args:
            in_channels: C of the input (B, C, *spatial).
            blocks: Each as in a recipe: ``dict(type='non_local', ...)``.
            dims: Spatial dimensions of the input.

        Raises:
            BlockError: No block, an unknown type or option, or a value not allowed.
        """
        if not blocks:
            raise BlockError("nlsurgery.Stack: blocks= is empty; give at least one block")
        layers = []
        for index, block in enumerate(blocks):
            options = dict(block)
            kind = options.pop("type", None)
            if kind not in BLOCK_TYPES:
                hint = close_names(str(kind), BLOCK_TYPES)
                raise BlockError(
                    f"nlsurgery.Stack: blocks[{index}].type {kind!r} is no block type{hint}; there "
                    f"are: {', '.join(sorted(BLOCK_TYPES))}"
                )
            layers.append(build_layer(kind, in_channels, dims, options))
        super().__init__(*layers)

    def init_weights(self) -> None:
        """Restore the identity of every block."""
        for layer in self:
            layer.init_weights()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks on (B, C, *spatial)."""
        return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]


def all_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every block in a model by its path: inserted ones and plugin layers.

    Args:
        model: Any model, not wrapped.
    """
    found = dict(blocks_of(model))
    known = {id(block) for block in found.values()}
    for path, module in model.named_modules():
        if isinstance(module, PluginLayer) and id(module) not in known:
            found[path] = module
    return found
