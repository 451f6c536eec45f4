"""Print the slow tests that a commit has to pass, drawn by its hash: ``sample.py COMMIT NUMBER``.

Each commit draws others, so that all are run over time; the same commit always draws the same.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys


def slow_tests() -> list[str]:
    """The ids of all tests that are marked slow and need no GPU."""
    # The project's own -q is dropped: twice -q prints counts in place of ids.
    quiet = ("-o", "addopts=--strict-markers", "--collect-only", "-q")
    command = [sys.executable, "-m", "pytest", *quiet, "-m", "slow and not gpu"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    # pytest ends with 5 where it collects nothing.
    if found.returncode not in (0, 5):
        sys.exit(f"collecting the slow tests failed:\n{found.stdout}{found.stderr}")
    return [line for line in found.stdout.splitlines() if "::" in line]


def main(commit: str, number: str) -> None:
    """Print ``number`` of the slow tests, or all of them if there are fewer."""

    def place(test: str) -> str:
        return hashlib.sha256(f"{commit} {test}".encode()).hexdigest()

    drawn = sorted(slow_tests(), key=place)[: int(number)]
    print("".join(f"{test}\n" for test in sorted(drawn)), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
