import subprocess
import sys

import pytest

HEAVY = ("timm", "torchvision", "mmengine", "matplotlib", "typer", "rich", "pydantic", "yaml")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_imports_point_down_only(request: pytest.FixtureRequest) -> None:
    linted = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=request.config.rootpath,
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert " kept, 0 broken" in linted.stdout


@pytest.mark.parametrize("module", HEAVY)
def test_import_of_the_package_leaves_out(module: str) -> None:
    # All in one process would let one failure hide the others' names.
    shown = run_python(f"import sys, nlsurgery; print({module!r} in sys.modules)")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == "False"


def test_every_public_name_resolves() -> None:
    shown = run_python(
        "import nlsurgery\n"
        "missing = [name for name in nlsurgery.__all__ if getattr(nlsurgery, name, None) is None]\n"
        "print(len(nlsurgery.__all__) > 0, missing)"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == "True []"
