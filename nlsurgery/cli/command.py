"""What every command shares: ``--debug``, one clear message per error, sizes as numbers."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import typer

from nlsurgery.errors import SurgeryError

DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", show_default=False)
]

#: The most sizes that ``--input-size`` takes: C, T, H and W.
_MOST_SIZES = 4


def reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--debug``; without it an error is a message on stderr and exit code 1.

    Args:
        command: A function that typer can make a command of.

    Returns:
        The same with one more option.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
    ]
    debug = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption
    )

    @functools.wraps(command)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            if debug or _is_typer_s(error):
                raise
            print_error(error)
            raise typer.Exit(1) from None

    # typer reads the signature and the annotations; both have to show the added option.
    run.__annotations__ = {**hints, "debug": DebugOption}
    run.__signature__ = inspect.Signature([*parameters, debug])  # type: ignore[attr-defined]
    del run.__wrapped__  # type: ignore[attr-defined]
    return run


def print_error(error: Exception) -> None:
    """Write one error to stderr, as a person reads it."""
    from rich.console import Console
    from rich.text import Text

    message = str(error) or type(error).__name__
    if not isinstance(error, SurgeryError | OSError):
        message = f"{type(error).__name__}: {message}\n(unexpected; --debug shows the traceback)"
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message))


def join_sizes(args: Sequence[str]) -> list[str]:
    """Join the numbers after ``--input-size`` into one value, since an option takes only one.

    Args:
        args: The words of the command line, e.g. ``["--input-size", "3", "224", "224", "--json"]``.

    Returns:
        The same words, e.g. ``["--input-size", "3x224x224", "--json"]``.
    """
    joined: list[str] = []
    sizes: list[str] | None = None
    for word in args:
        if sizes is not None and word.isdecimal() and len(sizes) < _MOST_SIZES:
            sizes.append(word)
            continue
        if sizes:
            joined.append("x".join(sizes))
        joined.append(word)
        sizes = [] if word == "--input-size" else None
    return [*joined, "x".join(sizes)] if sizes else joined


def _is_typer_s(error: Exception) -> bool:
    """Whether typer deals with an error: wrong usage, the ways to end, a reader that went away."""
    return isinstance(error, typer.Exit | typer.Abort | typer.BadParameter | BrokenPipeError)
