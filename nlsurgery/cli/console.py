"""Printing: tables for people, JSON for programs, numbers with units."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class ProgressBar:
    """A bar with the time to come on a terminal; a line now and then in a file or pipe."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(file=sys.stdout, highlight=False)
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: Any = None
        self.started = 0.0
        self.first = 0

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        if self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def update(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Show how far the run is.

        Args:
            step: Steps done.
            num_steps: Steps of the whole run.
            values: What the last step gave, such as its loss.
        """
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        if self.task is None:
            self.task = self.bar.add_task("training", total=num_steps, completed=step, text=text)
            self.started, self.first = time.monotonic(), step
        self.bar.update(self.task, completed=step, text=text)
        if self.console.is_terminal or (step % max(1, num_steps // 20) and step != num_steps):
            return
        pace = (time.monotonic() - self.started) / max(1, step - self.first)
        left = datetime.timedelta(seconds=round(pace * (num_steps - step)))
        print(f"step {step}/{num_steps}  {text}  left {left}", flush=True)


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    """Show a progress bar inside a ``with`` block."""
    progress = ProgressBar()
    with progress.bar:
        yield progress
