"""Write the generated tables into README.md: ``python docs/tables.py`` (``--check`` only compares)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nlsurgery.blocks import BLOCK_TYPES
from nlsurgery.recipe import list_recipes, load_recipe
from nlsurgery.schema import Depth, Every, InsertEntry

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks_table() -> str:
    """One row a block type: its name, options with their defaults, and source."""
    rows = ["| `type` | options (default) | source |", "|---|---|---|"]
    for name, entry in sorted(BLOCK_TYPES.items()):
        options = []
        for option, parameter in entry.options.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                options.append("its own")
            elif parameter.default is parameter.empty:
                options.append(f"`{option}`")
            else:
                options.append(f"`{option}` ({parameter.default})")
        rows.append(f"| `{name}` | {', '.join(options) or 'none'} | {entry.source} |")
    return "\n".join(rows)


def recipes_table() -> str:
    """One row a packaged recipe: its name, what it inserts where, and source."""
    rows = ["| recipe | inserts | source |", "|---|---|---|"]
    for name in list_recipes():
        recipe = load_recipe(name)
        inserts = "; ".join(_describe(entry) for entry in recipe.inserts)
        if recipe.within is not None:
            inserts += f", within {recipe.within}"
        rows.append(f"| `{name}` | {inserts} | {recipe.source} |")
    return "\n".join(rows)


def coverage_table() -> str:
    """One row a library, read off the summary of docs/coverage.md."""
    page = (README.parent / "docs" / "coverage.md").read_text(encoding="utf-8")
    columns = {"plan": "planned", "identity": "bit-exact", "every column": "every column"}
    rows = [
        f"| | models | {' | '.join(columns.values())} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for library in ("timm", "torchvision"):
        version = re.search(rf"\b{library} ([0-9.]*[0-9])", page)
        cells, total = [], "0"
        for column in columns:
            line = re.search(
                rf"^\| (?:\*\*)?{library}, {column}(?:\*\*)? \| (\d+) \| (\d+) \| (\d+)",
                page,
                re.MULTILINE,
            )
            assert line, f"docs/coverage.md has no line {library}, {column}"
            tried, total, held = line.groups()
            cells.append(held if tried == total else f"{held} of {tried} tried")
        name = f"{library} {version[1]}" if version else library
        rows.append(f"| {name} | {total} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _describe(entry: InsertEntry) -> str:
    after = entry.after
    if isinstance(after, Every):
        where = f"every {after.every}"
    elif isinstance(after, Depth):
        where = f"depth {after.depth}"
    else:
        where = str(after)
    at = "" if entry.at == "output" else f" at {entry.at}"
    return f"{entry.block['type']} in {entry.stage}, after {where}{at}"


def render(text: str) -> str:
    """Replace what stands between the table markers of a README."""
    tables = {
        "blocks": blocks_table(),
        "recipes": recipes_table(),
        "coverage": coverage_table(),
    }
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, found, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"README.md lacks the markers {start.strip()} and {end}")
        text = f"{head}{start}{table}\n{end}{tail}"
    return text


def main() -> int:
    """Write the README, or with ``--check`` say whether it is up to date."""
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
