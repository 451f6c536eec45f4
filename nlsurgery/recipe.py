"""Recipes: a path, a packaged name or a mapping becomes a checked, frozen ``Recipe``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from nlsurgery.blocks import BLOCK_TYPES, block_type, import_foreign
from nlsurgery.catalog import recipe_files
from nlsurgery.errors import BlockError, RecipeError, close_names
from nlsurgery.schema import InsertEntry, RecipeFile

#: Larger files, and files that expand to more nodes, are no recipes.
_MAX_BYTES = 1_000_000
_MAX_NODES = 20_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: The file's stem, or ``"recipe"`` for a mapping.
        origin: How errors name it: the path as given, or ``"recipe"``.
        source: Where the placement was published.
        published: The result published for it.
        inserts: Its entries.
        output_stride: The stride the network is brought to before the blocks go in, None for its own.
        within: The sub-module that is operated on by itself, None for the whole model.
        input_size: Its input size, (C, H, W) or (C, T, H, W).
    """

    name: str
    origin: str
    source: str | None
    published: str | None
    inserts: tuple[InsertEntry, ...]
    output_stride: Literal[8, 16] | None = None
    within: str | None = None
    input_size: tuple[int, ...] | None = None

    def path_of(self, fqn: str) -> str:
        """The path in the whole model of what is at ``fqn`` in the part operated on."""
        return fqn if self.within is None else f"{self.within}.{fqn}"

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as plain data that ``load_recipe`` takes again."""
        file = RecipeFile(
            version=1,
            source=self.source,
            published=self.published,
            output_stride=self.output_stride,
            within=self.within,
            input_size=None if self.input_size is None else list(self.input_size),
            inserts=list(self.inserts),
        )
        return dict(json.loads(file.model_dump_json(exclude_none=True)))


RecipeLike = str | Path | Mapping[str, Any] | Recipe


def list_recipes() -> tuple[str, ...]:
    """Names of the packaged recipes."""
    return tuple(recipe_files())


def load_recipe(recipe: RecipeLike, *, allow_imports: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: A path, the name of a packaged recipe, or a mapping with a recipe's fields.
            ``recipes/NAME.yaml`` means the packaged one where no such file stands.
        allow_imports: Packages whose modules a recipe may import as block types (``type: "pkg.Block"``);
            an import runs their code.

    Raises:
        RecipeError: It cannot be found or read, or says something not allowed.
    """
    if isinstance(allow_imports, str):
        raise RecipeError(f"allow_imports must be a list of packages: [{allow_imports!r}]")
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _check(dict(recipe), "recipe", "recipe", allow_imports)
    if not isinstance(recipe, str | Path):
        raise RecipeError(
            f"recipe must be a path, a recipe's name or a mapping, but got {type(recipe).__name__}"
        )
    path, origin = _find(recipe)
    return _check(_read_yaml(path, origin), path.stem, origin, allow_imports)


def _find(recipe: str | Path) -> tuple[Path, str]:
    path = Path(recipe)
    if path.is_file():
        return path, str(recipe)
    packaged = recipe_files()
    bare = path.parent in (Path(), Path("recipes"))
    if bare and path.suffix in ("", ".yaml", ".yml") and path.stem in packaged:
        return packaged[path.stem], f"recipes/{path.stem}.yaml"
    if path.is_dir():
        raise RecipeError(f"{recipe} is a folder, not a recipe file")
    hint = close_names(path.stem, packaged)
    raise RecipeError(
        f"no recipe {str(recipe)!r}: no such file, and no packaged recipe of that name{hint}. "
        f"Packaged: {', '.join(packaged)}"
    )


def _read_yaml(path: Path, origin: str) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _MAX_BYTES else b""
    except OSError as error:
        raise RecipeError(f"{origin} cannot be read: {error.strerror}") from error
    if size > _MAX_BYTES:
        raise RecipeError(f"{origin} has {size:,} bytes; a recipe has at most {_MAX_BYTES:,}")
    try:
        text = raw.decode("utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(node, origin)
        data = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{origin} is no UTF-8 text, so no YAML recipe") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{origin} is not safe YAML: {reason}") from error
    except RecursionError as error:
        raise RecipeError(f"{origin} is nested too deeply for a recipe") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{origin} must hold a mapping with 'version' and 'inserts', "
            f"but got {'nothing' if data is None else type(data).__name__}"
        )
    return data


def _check_nodes(root: yaml.Node | None, origin: str) -> None:
    """Refuse duplicate keys, and aliases that expand without bound."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def expanded(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise RecipeError(f"{origin}: an alias refers to itself{_line(node)}")
        open_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, origin)
        size = 1 + sum(expanded(kid) for kid in _node_children(node))
        open_nodes.discard(id(node))
        sizes[id(node)] = size
        if size > _MAX_NODES:
            raise RecipeError(
                f"{origin}: its aliases expand to more than {_MAX_NODES:,} nodes{_line(node)}; "
                f"write the entries out"
            )
        return size

    if root is not None:
        expanded(root)


def _node_children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_keys(node: yaml.MappingNode, origin: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise RecipeError(f"{origin}: the key {key.value!r} stands twice{_line(key)}")
            seen.add(key.value)


def _line(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})" if node.start_mark else ""


def _check(data: dict[str, Any], name: str, origin: str, allow_imports: Sequence[str]) -> Recipe:
    try:
        file = RecipeFile.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_explain(error, RecipeFile)}") from error
    entries = []
    for index, entry in enumerate(file.inserts):
        options = check_block(entry.block, f"{origin}: inserts[{index}].block", allow_imports)
        entries.append(entry.model_copy(update={"block": options}))
    if (file.within is None) != (file.input_size is None):
        raise RecipeError(f"{origin}: within and input_size go together: give both, or neither")
    if file.within is not None and file.output_stride is not None:
        raise RecipeError(
            f"{origin}: output_stride is of a whole network; leave it out beside within"
        )
    size = None if file.input_size is None else tuple(file.input_size)
    return Recipe(
        name, origin, file.source, file.published, tuple(entries), file.output_stride,
        file.within, size,
    )  # fmt: skip


def check_block(
    spec: Mapping[str, Any], where: str, allow_imports: Sequence[str] = ()
) -> dict[str, Any]:
    """Check ``{type: ..., options}`` against the block's own signature.

    Args:
        spec: The mapping as the recipe has it.
        where: How errors name the place.
        allow_imports: As in :func:`load_recipe`.

    Returns:
        The same options, checked.

    Raises:
        RecipeError: Unknown type or option, or a value not allowed.
    """
    options = dict(spec)
    kind = options.pop("type", None)
    if not isinstance(kind, str):
        raise RecipeError(
            f"{where}.type is missing: give one of {', '.join(sorted(BLOCK_TYPES))}"
            if kind is None
            else f"{where}.type must be a name, but got {kind!r}"
        )
    if "." in kind:
        return _check_foreign(kind, options, where, allow_imports)
    if kind not in BLOCK_TYPES:
        raise RecipeError(
            f"{where}.type {kind!r} is no block type{close_names(kind, BLOCK_TYPES)}; "
            f"there are: {', '.join(sorted(BLOCK_TYPES))}"
        )
    model = options_model(kind)
    try:
        # Strict, but as JSON: there a list is how a tuple is written, as it is in YAML.
        checked = model.model_validate_json(json.dumps(options))
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, model)}") from error
    except TypeError as error:
        raise RecipeError(f"{where}: options must be plain values ({error})") from error
    return {"type": kind, **{name: getattr(checked, name) for name in options}}


def _check_foreign(
    kind: str, options: dict[str, Any], where: str, allow_imports: Sequence[str]
) -> dict[str, Any]:
    try:
        import_foreign(kind, allow_imports)
        json.dumps(options)
    except BlockError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: options must be plain values ({error})") from error
    return {"type": kind, **options}


@cache
def options_model(kind: str) -> type[BaseModel]:
    """The pydantic model of a block type's options, made from its builder's signature."""
    entry = block_type(kind)
    target: Any = entry.build
    hints = get_type_hints(vars(target)["__init__"] if isinstance(target, type) else target)
    fields: dict[str, Any] = {}
    open_ended = False
    for option, parameter in entry.options.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[option] = (hints.get(option, Any), default)
    config = ConfigDict(
        extra="allow" if open_ended else "forbid", strict=True, protected_namespaces=()
    )
    return create_model(f"{kind}_options", __config__=config, **fields)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per problem: where, what came, what is allowed."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        keys = [key for key in item["loc"] if isinstance(key, int) or not _is_union_tag(str(key))]
        where = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
        if "after" in keys:
            where = where[: where.index("after") + len("after")]
            text = f"must be {_AFTER}, but got {_shorten(item['input'])}"
        elif item["type"] == "extra_forbidden":
            known = _fields_at(model, keys)
            hint = close_names(str(keys[-1]), known)
            text = f"is no known field{hint}; allowed: {', '.join(known)}"
        elif item["type"] == "missing":
            text = "is missing"
        else:
            text = f"{item['msg'][:1].lower()}{item['msg'][1:]}, but got {_shorten(item['input'])}"
        lines.setdefault(where, []).append(text)
    return "; ".join(f"{where} {' or '.join(dict.fromkeys(t))}" for where, t in lines.items())


#: What ``after`` takes, for errors: pydantic's own would list every member of the union.
_AFTER = "all, last, before_last, a block index, a list of indices, {every: n} or {depth: fraction}"


def _is_union_tag(key: str) -> bool:
    return key in ("int", "Every", "Depth", "str", "float") or "[" in key


def _fields_at(model: type[BaseModel], keys: list[Any]) -> list[str]:
    if model is RecipeFile and len(keys) > 2:
        return list(InsertEntry.model_fields)
    return list(model.model_fields)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
