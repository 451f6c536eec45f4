"""The JSON lines that a benchmark appends its measurements to, so that it can go on later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path | None) -> list[Row]:
    """Rows of an earlier run; none where the file is missing."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def append_row(path: Path | None, row: Row) -> None:
    """Add a row to the file, if there is to be one."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
