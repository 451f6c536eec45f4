"""Where the data folders are, in a wheel and in a source tree, and what lies in them."""

from __future__ import annotations

from pathlib import Path

from nlsurgery.errors import SurgeryError

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
