from collections.abc import Callable

import pytest

from nlsurgery.cli.app import main


@pytest.fixture
def run() -> Callable[..., int]:
    """Run ``nlsurgery`` with some words; returns the exit code."""

    def call(*args: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        return int(ended.value.code or 0)

    return call
