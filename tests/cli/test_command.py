import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer

import nlsurgery
from nlsurgery.cli import console
from nlsurgery.cli.app import main
from nlsurgery.cli.command import join_sizes
from nlsurgery.cli.options import parse_input_size

Run = Callable[..., int]
COMMANDS = ("inspect", "plan", "apply", "recipes", "finetune", "attend")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in shown] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_debug(
    command: str, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    assert run(command, "--help") == 0
    assert "--debug" in capsys.readouterr().out


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from nlsurgery.cli.app import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    heavy = ('torch', 'timm', 'torchvision', 'mmengine', 'matplotlib', 'numpy')\n"
        "    print('LOADED', [name for name in heavy if name in sys.modules])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "LOADED []" in shown.stdout


def test_version_is_the_package_s_own(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"nlsurgery {nlsurgery.__version__}"


def test_module_runs_as_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "nlsurgery", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "attend" in shown.stdout


def test_error_is_one_message_on_stderr(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    assert run("inspect", "timm/resnet5") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: no model 'resnet5' in timm (did you mean")
    assert "Traceback" not in shown.err


def test_debug_lets_the_error_through() -> None:
    from nlsurgery.errors import ModelError

    with pytest.raises(ModelError, match="no model 'resnet5'"):
        main(["inspect", "timm/resnet5", "--debug"])


def test_unexpected_error_names_its_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    import nlsurgery.recipe

    def fail() -> tuple[str, ...]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(nlsurgery.recipe, "list_recipes", fail)
    assert run("recipes") == 1
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: division by zero\n")


def test_usage_error_has_exit_code_two(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    assert run("inspect", "resnet18", "--no-such-option") == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        (
            ["m", "--input-size", "3", "64", "96", "--json"],
            ["m", "--input-size", "3x64x96", "--json"],
        ),
        (["--input-size", "64", "96", "m"], ["--input-size", "64x96", "m"]),
        (["m", "--input-size", "3x64x64"], ["m", "--input-size", "3x64x64"]),
        (["m", "--input-size"], ["m", "--input-size"]),
        (["m", "64", "64"], ["m", "64", "64"]),
    ],
    ids=["three", "two", "joined", "nothing", "other"],
)
def test_numbers_after_input_size_become_one_value(given: list[str], joined: list[str]) -> None:
    assert join_sizes(given) == joined


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, None),
        ("64x96", (64, 96)),
        ("1,28,28", (1, 28, 28)),
        ("3X8X112X112", (3, 8, 112, 112)),
    ],
)
def test_input_size_is_read(text: str | None, sizes: tuple[int, ...] | None) -> None:
    assert parse_input_size(text) == sizes


@pytest.mark.parametrize("text", ["224", "3x0x4", "axb", "1x2x3x4x5", "-1x3"])
def test_bad_input_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="must be H W"):
        parse_input_size(text)


def test_table_in_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    table = console.new_table("t", ("a", "b"))
    table.add_row("x" * 150, "y" * 60)
    console.print_table(table)
    assert f"{'x' * 150}   {'y' * 60}" in capsys.readouterr().out


def test_json_is_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": "z" * 300})
    assert json.loads(capsys.readouterr().out) == {"a": "z" * 300}
