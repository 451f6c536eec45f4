"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch

# One thread here and in every process a test starts: the workers share the cores, and runs that are
# compared to the last bit must sum in the same order.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Import mmengine before the workers do: its formatter's first import on a machine writes a file
    that another process may read half written."""
    if not hasattr(config, "workerinput"):
        import_module("mmengine")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
