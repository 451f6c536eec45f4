"""What a recipe would do to a model and what it would cost: nothing is changed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nlsurgery.blocks import block_type, build_foreign
from nlsurgery.errors import BlockError, RecipeError, SelectorError, SurgeryError
from nlsurgery.recipe import Recipe
from nlsurgery.resolve import InsertionPoint, resolve
from nlsurgery.sites import Record
from nlsurgery.stages import Anatomy
from nlsurgery.tables import count_text, size_text, text_table


@dataclass(frozen=True, slots=True)
class PlannedInsertion:
    """One row of a plan. Costs are for one sample at the probed input size, in float32.

    Attributes:
        fqn: Where the block will live.
        stage: Its stage.
        block: The residual block it goes after or into.
        at: ``output``, or the sub-module's path in the block.
        type: Block type.
        num_chs: Channels.
        feature_size: (H, W) or (T, H, W).
        layout: Layout of the host's output.
        num_positions: N, the product of ``feature_size``.
        num_params: Parameters it adds.
        flops: Floating-point operations of its forward (a multiply-add counts two).
        activation_bytes: Bytes that its training forward keeps for backward.
    """

    fqn: str
    stage: str
    block: str
    at: str
    type: str
    num_chs: int
    feature_size: tuple[int, ...]
    layout: str
    num_positions: int
    num_params: int
    flops: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``apply`` will do.

    Attributes:
        model: Class name of the model.
        recipe: The recipe's name.
        input_size: The probed input, without the batch.
        insertions: One row a block, in the order of insertion.
    """

    model: str
    recipe: str
    input_size: tuple[int, ...]
    insertions: tuple[PlannedInsertion, ...]
    points: tuple[InsertionPoint, ...] = field(repr=False, compare=False)
    source: Recipe = field(repr=False, compare=False)

    @property
    def num_params(self) -> int:
        """Parameters that all blocks add."""
        return sum(row.num_params for row in self.insertions)

    @property
    def flops(self) -> int:
        """Floating-point operations that all blocks add to one sample's forward."""
        return sum(row.flops for row in self.insertions)

    @property
    def activation_bytes(self) -> int:
        """Bytes that all blocks keep for backward, for one sample in float32."""
        return sum(row.activation_bytes for row in self.insertions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "input_size": list(self.input_size),
            "insertions": [asdict(row) for row in self.insertions],
            "num_params": self.num_params,
            "flops": self.flops,
            "activation_bytes": self.activation_bytes,
        }

    def __str__(self) -> str:
        head = ("after", "type", "chs", "size", "layout", "N", "params", "FLOPs", "act. memory")
        rows = [
            (
                row.block if row.at == "output" else f"{row.block} at {row.at}",
                row.type,
                str(row.num_chs),
                size_text(row.feature_size),
                row.layout,
                str(row.num_positions),
                f"{row.num_params:,}",
                count_text(row.flops),
                count_text(row.activation_bytes, "B"),
            )
            for row in self.insertions
        ]
        total = (
            "total",
            "",
            "",
            "",
            "",
            "",
            f"{self.num_params:,}",
            count_text(self.flops),
            count_text(self.activation_bytes, "B"),
        )
        size = size_text(self.input_size)
        caption = f"{self.recipe} on {self.model}, per sample of {size} in float32"
        return text_table(head, [*rows, total]) + "\n" + caption


def make_plan(model: nn.Module, anatomy: Anatomy, recipe: Recipe) -> Plan:
    """Resolve a recipe against a model and cost it.

    Args:
        model: The live model, or the part of it that the recipe is for; only looked at.
        anatomy: Its stages.
        recipe: The recipe.

    Raises:
        SelectorError: An entry matches nothing or a place that cannot take a block.
        RecipeError: A block refuses its options at a place.
    """
    points = resolve(anatomy, recipe)
    if not points:
        raise SelectorError(f"{recipe.origin} inserts nothing into {anatomy.model}")
    costs: dict[str, tuple[int, int, int]] = {}
    depth: dict[str, int] = {}
    rows = []
    for point in points:
        key = repr((point.entry.block, point.feature, point.site.layout))
        if key not in costs:
            try:
                costs[key] = _cost(point)
            except BlockError as error:
                raise _refused(point, error) from error
        child = point.site.child_fqn
        place = depth.get(child, _occupied(model, child))
        depth[child] = place + 1
        rows.append(_row(point, recipe, f"{child}.{place}", costs[key]))
    size = anatomy.input_size
    return Plan(anatomy.model, recipe.name, size, tuple(rows), points, recipe)


def _occupied(model: nn.Module, child: str) -> int:
    try:
        return len(model.get_submodule(child)._modules)
    except AttributeError:
        return 0


def _row(
    point: InsertionPoint, recipe: Recipe, fqn: str, cost: tuple[int, int, int]
) -> PlannedInsertion:
    feature = point.feature
    return PlannedInsertion(
        recipe.path_of(fqn),
        point.stage,
        recipe.path_of(point.block),
        point.at,
        str(point.entry.block["type"]),
        feature.num_chs,
        feature.feature_size,
        feature.layout.kind,
        math.prod(feature.feature_size),
        *cost,
    )


def build_block(point: InsertionPoint) -> nn.Module:
    """Build the block of an insertion point on the default device.

    Raises:
        RecipeError: The block refuses its options for this place's channels and dimensions.
    """
    options = dict(point.entry.block)
    kind, num_chs, dims = options.pop("type"), point.feature.num_chs, point.site.layout.dims
    try:
        if "." in kind:
            return build_foreign(kind, num_chs, dims=dims, options=options)
        return block_type(kind).build(num_chs, dims=dims, **options)
    except SurgeryError as error:
        raise _refused(point, error) from error


def _refused(point: InsertionPoint, error: SurgeryError) -> RecipeError:
    return RecipeError(f"{point.where}.block at {point.site.host}: {error}")


def make_record(point: InsertionPoint, plan: Plan, order: int) -> Record:
    """What the model will remember of a block."""
    return Record(
        point.stage,
        plan.source.path_of(point.block),
        point.at,
        str(point.entry.block["type"]),
        point.feature.num_chs,
        point.feature.feature_size,
        order,
        plan.source.to_mapping(),
        plan.input_size,
    )


@torch.inference_mode(False)  # the caller may be in it: nothing would be kept for backward
def _cost(point: InsertionPoint) -> tuple[int, int, int]:
    """(parameters, FLOPs of one forward, bytes kept for backward) of a block, on meta tensors."""
    size = point.feature.feature_size
    if point.site.layout.dims == 1:
        size = (math.prod(size),)
    with torch.device("meta"):
        block = build_block(point).float()
        x = torch.empty((1, point.feature.num_chs, *size), dtype=torch.float32, requires_grad=True)
    params = sum(p.numel() for p in block.parameters())
    own = {p.data_ptr() if p.device.type != "meta" else id(p) for p in block.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    block.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(x.detach())
    block.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)
    return params, counter.get_total_flops(), sum(storages.values())
