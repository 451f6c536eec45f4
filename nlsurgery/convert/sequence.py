"""Blocks that stand as elements of an ``nn.Sequential``: taking them out renumbers what follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_ELEMENT = re.compile(r"(?P<parent>.*?)(?P<index>\d+)")


def hosts_before(prefixes: Iterable[str]) -> dict[str, str]:
    """The elements that blocks stand after, in the numbers they have without the blocks.

    Args:
        prefixes: Paths of blocks; only those that end in an index above 0 count.

    Returns:
        Block path -> path of the element before.
    """
    hosts = {}
    for parent, indices in _indices(prefixes).items():
        for index in indices:
            before = index - 1 - sum(other < index for other in indices)
            if before >= 0:
                hosts[f"{parent}{index}"] = f"{parent}{before}"
    return hosts


def renumber(key: str, prefixes: Iterable[str]) -> str:
    """A key in the numbers it has once the blocks are taken out of their sequences.

    Args:
        key: A key of another element.
        prefixes: Paths of the blocks that go.
    """
    for parent, indices in sorted(_indices(prefixes).items(), reverse=True):
        if (match := re.fullmatch(re.escape(parent) + r"(\d+)((?:\..*)?)", key)) is not None:
            index = int(match[1])
            key = f"{parent}{index - sum(other < index for other in indices)}{match[2]}"
    return key


def _indices(prefixes: Iterable[str]) -> Mapping[str, tuple[int, ...]]:
    taken: dict[str, tuple[int, ...]] = {}
    for prefix in prefixes:
        match = _ELEMENT.fullmatch(prefix)
        if match is not None and match["parent"].endswith(".") and int(match["index"]) > 0:
            parent = match["parent"]
            taken[parent] = (*taken.get(parent, ()), int(match["index"]))
    return taken
