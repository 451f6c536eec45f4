import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nlsurgery

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation: hatchling comes with the extra `test`, and nothing is downloaded.
    built = run_python(
        "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = ("install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    done = run_python("-m", "pip", "--disable-pip-version-check", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def run_python(
    *words: object, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder; ``path`` is looked for packages before any other place."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"nlsurgery/_data/recipes/{name}.yaml" for name in nlsurgery.list_recipes()} <= names
    assert "nlsurgery/py.typed" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nlsurgery").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {
        "nlsurgery",
        f"nlsurgery-{nlsurgery.__version__}.dist-info",
    }


def test_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = "import nlsurgery; print(nlsurgery.__file__); print(nlsurgery.list_recipes())"
    shown = run_python("-c", script, cwd=tmp_path, path=installed)
    assert shown.returncode == 0, shown.stderr
    file, recipes = shown.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert recipes == str(nlsurgery.list_recipes())


def test_installed_command_lists_the_recipes(installed: Path, tmp_path: Path) -> None:
    shown = run_python(
        installed / "bin" / "nlsurgery", "recipes", "--json", cwd=tmp_path, path=installed
    )
    assert shown.returncode == 0, shown.stderr
    assert [item["name"] for item in json.loads(shown.stdout)] == list(nlsurgery.list_recipes())


def test_recipes_path_means_the_packaged_one_from_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    script = "import nlsurgery; print(nlsurgery.load_recipe('recipes/res4_5blocks.yaml').source)"
    shown = run_python("-c", script, cwd=tmp_path, path=installed)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == nlsurgery.load_recipe("res4_5blocks").source
