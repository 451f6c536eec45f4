"""The command ``nlsurgery``. Torch loads inside the commands, so that help is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import nlsurgery
from nlsurgery.cli.apply import apply
from nlsurgery.cli.attend import attend
from nlsurgery.cli.command import join_sizes, reporting_errors
from nlsurgery.cli.convert import convert
from nlsurgery.cli.finetune import finetune
from nlsurgery.cli.inspect import inspect
from nlsurgery.cli.plan import plan
from nlsurgery.cli.recipes import recipes

app = typer.Typer(
    name="nlsurgery",
    help="Insert non-local and self-attention blocks into a timm or torchvision backbone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"nlsurgery {nlsurgery.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


for _command in (inspect, plan, apply, recipes, finetune, attend, convert):
    app.command()(reporting_errors(_command))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code.

    Args:
        args: The words after ``nlsurgery``; the process's own when None.
    """
    app(args=join_sizes(sys.argv[1:] if args is None else args), prog_name="nlsurgery")
