"""Where the data folders are, in a wheel and in a source tree, and what lies in them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import ValidationError

from nlsurgery.errors import SurgeryError
from nlsurgery.schema import RegistryFile

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """Find a data folder: inside the installed package, else beside it in a source tree.

    Args:
        name: ``"recipes"`` or ``"registry"``.

    Raises:
        SurgeryError: The installation lacks it.
    """
    packaged = _PACKAGE / "_data" / name
    if packaged.is_dir():
        return packaged
    root = _PACKAGE.parent
    if (root / "pyproject.toml").is_file() and (root / name).is_dir():
        return root / name
    raise SurgeryError(
        f"the data folder {name!r} is missing from this installation of nlsurgery "
        f"({_PACKAGE}): install it again"
    )


def recipe_files() -> dict[str, Path]:
    """Every packaged recipe's file by name, sorted."""
    return {path.stem: path for path in sorted(data_folder("recipes").glob("*.yaml"))}


@cache
def registry() -> dict[str, RegistryFile]:
    """Every registry entry by the full path of its class.

    Raises:
        SurgeryError: An entry is not valid.
    """
    entries: dict[str, RegistryFile] = {}
    for path in sorted(data_folder("registry").glob("*.yaml")):
        try:
            entry = RegistryFile.model_validate(yaml.safe_load(path.read_text("utf-8")))
        except (yaml.YAMLError, ValidationError) as error:
            raise SurgeryError(f"registry/{path.name} is no valid entry: {error}") from error
        if entry.model in entries:
            raise SurgeryError(f"registry/{path.name}: {entry.model} has an entry already")
        entries[entry.model] = entry
    return entries


def registered(model: object) -> RegistryFile | None:
    """The registry entry of a model's class or the nearest of its bases, None when there is none."""
    known = registry()
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
    return next((known[name] for name in names if name in known), None)
