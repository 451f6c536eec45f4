"""Printing: tables for people, JSON for programs, numbers with units."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

#: Wider than any table.
_UNLIMITED = 10_000

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON document to stdout, never wrapped or coloured."""
    typer.echo(json.dumps(value, indent=2))


def new_table(title: str, columns: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    """Make an empty table.

    Args:
        title: The line above it.
        columns: The headers.
        right: Those of them whose cells are numbers, set to the right.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table to stdout: fitted to a terminal, at its full width into a file or pipe."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_UNLIMITED)
        console.width = console.measure(table).maximum
    console.print(table)


def print_record(name: str, fields: Mapping[str, Sequence[str]]) -> None:
    """Print a name and, under it, its fields, the lines of each under one another."""
    typer.echo(typer.style(name, bold=True))
    width = max(len(field) for field in fields)
    for field, lines in fields.items():
        for index, line in enumerate(lines):
            typer.echo(f"  {field if index == 0 else '':<{width}}  {line}")
    typer.echo()


def say(text: str) -> None:
    """Print a line of plain text to stdout."""
    typer.echo(text)


def warn(text: str) -> None:
    """Print a line of plain text to stderr."""
    typer.echo(f"warning: {text}", err=True)


def count(value: int) -> str:
    """Format a whole number with thousands separators: ``1,050,624``."""
    return f"{value:,}"


def flops(value: float) -> str:
    """Format FLOPs (multiply and add count two) with a decimal prefix: ``1.23 G``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:.0f}"


def size(num_bytes: float) -> str:
    """Format a number of bytes with a binary prefix: ``1.5 MiB``."""
    for factor, prefix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {prefix}"
    return f"{num_bytes:.0f} B"


def shape(sizes: Sequence[int]) -> str:
    """Format sizes as people write them: ``14×14``."""
    return "×".join(str(item) for item in sizes)
