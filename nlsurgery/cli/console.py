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
