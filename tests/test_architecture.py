import subprocess
import sys

import pytest

LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
OUTER = ("timm", "torchvision", "mmengine", "matplotlib", "typer", "rich")
HEAVY = (*OUTER, "pydantic", "yaml", "safetensors")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_imports_point_down_only(request: pytest.FixtureRequest) -> None:
    linted = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=request.config.rootpath,
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert " kept, 0 broken" in linted.stdout


def test_import_of_the_package_is_light() -> None:
    shown = run_python(f"import sys, nlsurgery; print([m for m in {HEAVY} if m in sys.modules])")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == "[]"


def test_surgery_needs_no_outer_library() -> None:
    code = (
        "import sys, torch, nlsurgery\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))\n"
        "block = {'type': 'self_attention'}\n"
        "recipe = {'version': 1, 'inserts': [{'stage': -1, 'block': block}]}\n"
        "nlsurgery.apply(model, recipe, input_size=(3, 16, 16))\n"
        f"print([m for m in {OUTER} if m in sys.modules])"
    )
    shown = run_python(code)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    shown = run_python(
        "import nlsurgery\n"
        "missing = [name for name in nlsurgery.__all__ if getattr(nlsurgery, name, None) is None]\n"
        "print(len(nlsurgery.__all__) > 0, missing)"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == "True []"
