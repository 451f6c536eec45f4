"""The shape of the YAML files: what a recipe may say, checked by pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class Strict(BaseModel):
    """Base of all file models: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Every(Strict):
    """Every n-th block of a stage: block n - 1, 2n - 1, ... (``every: 2`` is 1, 3, 5)."""

    every: PositiveInt


class Depth(Strict):
    """The block at a fraction of the stage's depth: 0.5 is the one that ends its first half."""

    depth: Annotated[float, Field(gt=0, le=1)] | list[Annotated[float, Field(gt=0, le=1)]]


After = (
    Literal["all", "last", "before_last"]
    | int
    | Annotated[list[int], Field(min_length=1)]
    | Every
    | Depth
)


class InsertEntry(Strict):
    """One entry of a recipe: which block goes where.

    Attributes:
        stage: ``res2`` ... ``res5``, ``stage1`` ..., a module path, or a negative index.
        after: After which blocks of the stage.
        at: ``output`` of the block, or a sub-module inside it (a path, a glob, or a role such as
            ``after_conv3`` and ``before_add``).
        block: ``type`` and its options.
        stack: Allow the place to hold another inserted block already.
        allow_dead: Allow a place that no output of the model depends on.
        branch: Which of several parallel outputs, for networks with branches.
    """

    stage: str | int
    after: After = "last"
    at: Annotated[str, Field(min_length=1)] = "output"
    block: dict[str, Any]
    stack: bool = False
    allow_dead: bool = False
    branch: NonNegativeInt | None = None


class RecipeFile(Strict):
    """A recipe, version 1.

    Attributes:
        version: Always 1.
        source: Where the placement was published.
        published: The result published for it.
        output_stride: Bring the network to this stride first: its last down-samplings become dilation.
        within: Operate on this sub-module by itself: one that a forward of the whole model reaches with
            sizes of its own, such as a head on the regions a detector proposes.
        input_size: Of ``within``, and needed there: (C, H, W) or (C, T, H, W).
        inserts: The entries, at least one.
    """

    version: Literal[1]
    source: str | None = None
    published: str | None = None
    output_stride: Literal[8, 16] | None = None
    within: Annotated[str, Field(min_length=1)] | None = None
    input_size: Annotated[list[PositiveInt], Field(min_length=3, max_length=4)] | None = None
    inserts: Annotated[list[InsertEntry], Field(min_length=1)]


class RegistryFile(Strict):
    """An entry of the registry, version 1: what cannot be read off an architecture's data flow.

    Attributes:
        version: Always 1.
        model: The class by its full path, such as ``torchvision.models.inception.Inception3``.
        reason: Why the data flow does not tell.
        backbone: The sub-module to look at in place of the whole model.
        input_size: The input it is made for where the model does not say: (C, H, W) or (C, T, H, W).
        token_order: ``sequence``: its tokens do not stand row by row, so they have no (H, W) grid.
    """

    version: Literal[1]
    model: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")]
    reason: Annotated[str, Field(min_length=20)]
    backbone: str | None = None
    input_size: Annotated[list[PositiveInt], Field(min_length=3, max_length=4)] | None = None
    token_order: Literal["sequence"] | None = None
