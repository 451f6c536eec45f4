"""What every command shares: ``--debug``, one clear line per error, ``--input-size`` as numbers."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from nlsurgery.errors import SurgeryError

_DEBUG = "nlsurgery.debug"
_EXPECTED = (SurgeryError, OSError)


class SurgeryCommand(TyperCommand):
    """A command whose errors go to stderr as one message, exit code 1; ``--debug`` shows all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the command of typer's arguments and add ``--debug`` to it."""
        super().__init__(*args, **kwargs)
        self.params.append(
            TyperOption(
                param_decls=["--debug"],
                is_flag=True,
                default=False,
                expose_value=False,
                show_default=False,
                callback=_remember_debug,
                help="Show the traceback of an error.",
            )
        )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command's arguments, the numbers after ``--input-size`` as one value."""
        return super().parse_args(ctx, join_sizes(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes a message and exit code 1, unless ``--debug``."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # Usage errors have a style and an exit code of their own, which typer gives them.
            if ctx.meta.get(_DEBUG) or hasattr(error, "exit_code"):
                raise
            print_error(error)
            raise typer.Exit(1) from None


def print_error(error: Exception) -> None:
    """Write one error to stderr, as a person reads it."""
    from rich.console import Console
    from rich.text import Text

    message = str(error) or type(error).__name__
    if not isinstance(error, _EXPECTED):
        message = f"{type(error).__name__}: {message}\n(unexpected; --debug shows the traceback)"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message))
    sys.stderr.flush()


def join_sizes(args: list[str]) -> list[str]:
    """Join the numbers after ``--input-size`` into one value, since an option takes only one.

    Args:
        args: The words of the command line, e.g. ``["--input-size", "3", "224", "224", "--json"]``.

    Returns:
        The same words, e.g. ``["--input-size", "3x224x224", "--json"]``.
    """
    joined: list[str] = []
    words = iter(range(len(args)))
    for index in words:
        joined.append(args[index])
        if args[index] != "--input-size":
            continue
        sizes = []
        while len(sizes) < 4 and args[index + 1 + len(sizes) : index + 2 + len(sizes)]:
            word = args[index + 1 + len(sizes)]
            if not word.isdecimal():
                break
            sizes.append(word)
        if sizes:
            joined.append("x".join(sizes))
            for _ in sizes:
                next(words)
    return joined


def _remember_debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True
