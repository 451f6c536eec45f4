"""mmengine's loggers keep files open and pile up over tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer


@pytest.fixture(autouse=True)
def _fresh_mmengine() -> Iterator[None]:
    """Close what a Runner opened, and forget its global instances."""
    yield
    for name in [name for name in MMLogger._instance_dict if name != "mmengine"]:
        for handler in MMLogger._instance_dict.pop(name).handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
    for manager in (MessageHub, Visualizer, DefaultScope):
        manager._instance_dict.clear()
