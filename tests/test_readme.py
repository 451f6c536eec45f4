"""The README: its tables are what the code says, its examples run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

import nlsurgery
from nlsurgery.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_tables_are_up_to_date() -> None:
    render = runpy.run_path(str(ROOT / "docs" / "tables.py"))["render"]
    assert render(TEXT) == TEXT, "run: python docs/tables.py"


@pytest.mark.parametrize("number", range(len(snippets("python"))))
def test_python_example_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # No weights can be downloaded in a test: the same code on random ones.
    code = snippets("python")[number].replace("pretrained=True", "pretrained=False")
    exec(compile(code, f"README.md, example {number}", "exec"), {})
    printed = capsys.readouterr().out
    if "max |Δ|" in code:
        assert "max |Δ| = 0.0" in printed
        shown = TEXT.partition(code.replace("pretrained=False", "pretrained=True"))[2]
        table = shown.partition("```text\n")[2].partition("```")[0]
        assert table == printed


@pytest.mark.parametrize("number", range(len(snippets("yaml"))))
def test_yaml_example_is_a_recipe(number: int) -> None:
    assert load_recipe(yaml.safe_load(snippets("yaml")[number])).inserts


def test_every_command_in_the_readme_exists() -> None:
    from nlsurgery.cli.app import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(
        re.findall(r"^(?:\$ )?nlsurgery ([a-z]+)", "\n".join(snippets("bash")), re.MULTILINE)
    )
    assert named
    assert named <= known


def test_the_plan_shown_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from nlsurgery.cli.app import app

    words = "plan resnet50 res4_5blocks"
    assert f"nlsurgery {words} " in TEXT
    with pytest.raises(SystemExit) as ended:
        app(args=words.split())
    assert not ended.value.code
    printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    assert "\n".join(["```text", *printed, "```"]) in TEXT


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_version_is_the_projects() -> None:
    assert f'version = "{nlsurgery.__version__}"' in (ROOT / "pyproject.toml").read_text()
