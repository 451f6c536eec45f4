"""Checkpoint files of the projects: caffe2's pickled blobs read safely, each project's own written."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nlsurgery.checkpoint import METADATA_KEY, atomic_write, read_state_dict
from nlsurgery.convert.ours import UNTOLD
from nlsurgery.convert.registry import OURS, layout_named
from nlsurgery.convert.result import Conversion
from nlsurgery.errors import CheckpointError

#: All that a pickle of arrays may call; numpy moved its module between versions 1 and 2.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding="utf-8": text.encode(encoding),
}
_REBUILD = ("_reconstruct", "scalar")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and numpy arrays, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in _REBUILD:
            # Not under its own name: numpy moved it between versions 1 and 2.
            return getattr(sys.modules[np.ndarray.__reduce__(np.empty(0))[0].__module__], name)
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint: caffe2 blobs from ``.pkl``, else as ``nlsurgery.checkpoint`` does.

    Raises:
        CheckpointError: It is missing, damaged, or holds more than arrays.
    """
    if path.suffix != ".pkl":
        return read_state_dict(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with path.open("rb") as file:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:
        raise CheckpointError(
            f"{path} is no pickle of arrays, or it is cut off ({type(error).__name__}: {error})"
        ) from error
    blobs = loaded.get("blobs", loaded) if isinstance(loaded, Mapping) else {}
    arrays = {
        str(name): torch.from_numpy(np.array(value))
        for name, value in blobs.items()
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
    }
    if not arrays:
        raise CheckpointError(f"{path} holds no arrays by name")
    return arrays


def write_foreign(conversion: Conversion, path: Path) -> None:
    """Write a conversion: ``.safetensors``; ``.pth`` or ``.pt`` as its project keeps it; ``.pkl``.

    Raises:
        CheckpointError: The suffix is another one, or the file cannot be written.
    """
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in conversion.tensors.items()}
    wrapper = "state_dict"
    if conversion.target != OURS:
        wrapper = layout_named(conversion.target).wrapper
    if path.suffix not in (".safetensors", ".pth", ".pt", ".pkl"):
        raise CheckpointError(
            f"--out {path} must end in .safetensors, .pth, .pt or, for caffe2, .pkl"
        )
    if (path.suffix == ".pkl") != (wrapper == "blobs") and path.suffix != ".safetensors":
        raise CheckpointError(
            f"--out {path}: caffe2 blobs are written to .pkl, other layouts to .pth or .safetensors"
        )
    with atomic_write(path) as part:
        if path.suffix == ".safetensors":
            save_file(tensors, part, {"format": "pt"})
        elif path.suffix == ".pkl":
            with part.open("wb") as file:
                pickle.dump({"blobs": {k: v.numpy() for k, v in tensors.items()}}, file, 2)
        else:
            torch.save({wrapper: tensors}, part)


def saved_options(path: Path) -> dict[str, dict[str, Any]]:
    """What the blocks in a file of ``nlsurgery.save`` were built with, by path.

    Returns:
        The options that its recipe gives each type of block; empty where the file has no recipe.

    Raises:
        CheckpointError: Blocks of one type have different options, so the file alone does not tell
            which is which.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        return {}
    surgery = json.loads(metadata[METADATA_KEY])
    by_type: dict[str, list[dict[str, Any]]] = {}
    for step in surgery["applied"]:
        for entry in step["recipe"]["inserts"]:
            block = dict(entry["block"])
            kind = block.pop("type")
            told = UNTOLD.get(kind, {})
            block = told | {name: value for name, value in block.items() if name in told}
            if block not in by_type.setdefault(kind, []):
                by_type[kind].append(block)
    for kind, options in by_type.items():
        if len(options) > 1:
            raise CheckpointError(
                f"{path} has {kind} blocks with different options: name its model with --model, so "
                f"that each one's are known"
            )
    return {fqn: by_type[kind][0] for fqn, kind in surgery["insertions"] if kind in by_type}
