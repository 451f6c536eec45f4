"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

# One thread here and in every process a test starts: the workers share the cores, and runs that are
# compared to the last bit must sum in the same order.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
