"""Checkpoints: safetensors with the recipe inside, whole or the inserted parts alone.

Files are written beside their place and moved there when complete, so that a full disk or a kill
leaves the old file as it was. Reading checks everything before the model is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nlsurgery.errors import CheckpointError, close_names
from nlsurgery.reporting import is_inserted_key, report, require_operated
from nlsurgery.splice import hosts
from nlsurgery.surgery import apply, remove
from nlsurgery.walk import CHILD_NAME, check_operable

#: The metadata field of a safetensors file that holds the surgery, as JSON.
METADATA_KEY = "nlsurgery"
_FORMAT = 1
#: Where training frameworks keep the state_dict in a checkpoint, in the order tried.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "model_state", "params")


def save(model: nn.Module, path: str | Path, *, inserted_only: bool = False) -> Path:
    """Write a model with its surgery to a safetensors file.

    Args:
        model: An operated model.
        path: The file; its folder must exist. Replaced only once the new file is complete.
        inserted_only: Keep the inserted parameters and buffers alone.

    Returns:
        The path.

    Raises:
        ModelError: Nothing is inserted.
        CheckpointError: The file cannot be written.
    """
    require_operated(model)
    state = model.state_dict()
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in state.items()
        if isinstance(value, Tensor) and (is_inserted_key(key) or not inserted_only)
    }
    metadata = {METADATA_KEY: json.dumps(_describe(model, inserted_only)), "format": "pt"}
    target = Path(path)
    with atomic_write(target) as part:
        save_file(tensors, part, metadata)
    return target


def load(model: nn.Module, path: str | Path, *, allow_imports: Sequence[str] = ()) -> nn.Module:
    """Read a file of :func:`save` into a model: every key strictly, or nothing at all.

    A fresh original model gets the recipe in the file applied first. An operated model must hold the
    same blocks at the same places.

    Args:
        model: The original model, or one operated in the same way; changed in place.
        path: A file written by :func:`save`.
        allow_imports: Packages whose modules its recipe may import as block types (``type: "pkg.Block"``);
            an import runs their code.

    Returns:
        The same model.

    Raises:
        CheckpointError: The file cannot be read, was not written by :func:`save`, or does not fit.
        RecipeError: Its recipe does not fit the model.
    """
    check_operable(model)
    tensors, surgery = _read_saved(Path(path))
    fresh = not any(True for _ in hosts(model))
    try:
        if fresh:
            for step in surgery["applied"]:
                apply(
                    model,
                    step["recipe"],
                    input_size=tuple(step["input_size"]),
                    allow_imports=allow_imports,
                )
        here = [[row.fqn, row.type] for row in report(model).insertions]
        if here != surgery["insertions"]:
            raise CheckpointError(
                f"{path} holds blocks at {_places(surgery['insertions'])}, the model at "
                f"{_places(here)}: load it into the original model"
            )
        wanted = set(model.state_dict())
        if surgery["inserted_only"]:
            wanted = {key for key in wanted if is_inserted_key(key)}
        load_tensors(model, tensors, str(path), wanted)
    except BaseException:
        if fresh:
            remove(model)
        raise
    return model


def _places(insertions: list[list[str]]) -> str:
    places = [fqn.partition(f".{CHILD_NAME}.")[0] for fqn, _ in insertions]
    return ", ".join(places[:6]) + (", ..." if len(places) > 6 else "") or "no place"


def _describe(model: nn.Module, inserted_only: bool) -> dict[str, Any]:
    steps: dict[int, dict[str, Any]] = {}
    for _, _, inserted in hosts(model):
        for record in inserted.records:
            steps[record.order] = {
                "recipe": dict(record.recipe),
                "input_size": list(record.input_size),
            }
    return {
        "version": _FORMAT,
        "model": type(model).__name__,
        "inserted_only": inserted_only,
        "applied": [steps[order] for order in sorted(steps)],
        "insertions": [[row.fqn, row.type] for row in report(model).insertions],
    }


def _read_saved(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = _read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} holds no recipe, so nlsurgery.save did not write it; for a plain checkpoint: "
            f"model.load_state_dict first, nlsurgery.apply after"
        )
    try:
        surgery = json.loads(metadata[METADATA_KEY])
        if surgery["version"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {surgery['version']}, this nlsurgery reads {_FORMAT}: "
                f"upgrade nlsurgery"
            )
        _ = surgery["applied"], surgery["insertions"], surgery["inserted_only"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: the recipe in it is damaged ({error})") from error
    return tensors, surgery


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint: safetensors, or a torch file with ``weights_only``.

    A state_dict inside a training checkpoint (``state_dict``, ``model``, ...) is found, and a common
    ``module.`` prefix is taken off.

    Args:
        path: ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``.

    Raises:
        CheckpointError: It is missing, cut off, not a checkpoint, or holds code.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)[0]
    _require_file(file)
    try:
        with warnings.catch_warnings():
            # Torch warns of the pickle protocol; the error says what is wrong.
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read safely: it is damaged, or holds Python objects beside tensors"
            f"{_refused_object(error)}. Save its state_dict alone, or as .safetensors"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is no readable torch checkpoint, or it is cut off "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
        ) from error
    return _find_state(loaded, str(path))


def _refused_object(error: pickle.UnpicklingError) -> str:
    """Name what torch's safe loader refused; the rest of its text advises to load unsafely."""
    found = re.search(
        r"unsupported global: ?GLOBAL ([\w.]+)|unsupported GLOBAL ([\w.]+)", str(error), re.I
    )
    return f" ({found[1] or found[2]})" if found else ""


def _find_state(loaded: Any, origin: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for wrapper in _WRAPPERS:
            inner = loaded.get(wrapper)
            if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
                return _find_state(inner, origin)
        tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        if tensors:
            if all(key.startswith("module.") for key in tensors):
                tensors = {key.removeprefix("module."): v for key, v in tensors.items()}
            return tensors
    raise CheckpointError(
        f"{origin} holds no state_dict: no mapping of names to tensors was found in it"
    )


def _require_file(path: Path) -> None:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {kind}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file, or it is cut off ({error})"
        ) from error


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str, wanted: set[str] | None = None
) -> None:
    """Copy tensors into a model strictly; nothing is copied unless every key and shape fits.

    Args:
        model: The model.
        tensors: Values by state_dict key.
        origin: How errors name the checkpoint.
        wanted: The keys to expect; all of the model's by default.

    Raises:
        CheckpointError: Missing or unknown keys, or other shapes.
    """
    own = model.state_dict()
    expected = set(own) if wanted is None else wanted
    missing = [key for key in own if key in expected and key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in expected and key in tensors and tensors[key].shape != own[key].shape
    ]
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if unknown:
        hint = close_names(unknown[0], expected)
        problems.append(f"has {_some(unknown)} that the model lacks{hint}")
    if shapes:
        problems.append(f"has other shapes: {_some(shapes)}")
    if problems:
        raise CheckpointError(
            f"{origin} does not fit {type(model).__name__}: it {'; it '.join(problems)}"
        )
    model.load_state_dict({key: tensors[key] for key in own if key in expected}, strict=False)


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:3])
    return f"{shown} and {len(items) - 3} more" if len(items) > 3 else shown


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a file to write beside ``target``, moved onto it when the block ends without an error.

    Args:
        target: The file to replace; its folder must exist.

    Raises:
        CheckpointError: The folder is missing or cannot be written, or the disk is full.
    """
    folder = target.parent
    if not folder.is_dir():
        raise CheckpointError(f"{target} cannot be written: the folder {folder} does not exist")
    if target.is_dir():
        raise CheckpointError(f"{target} cannot be written: it is a folder")
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=folder)
        os.close(handle)
        part = Path(name)
        yield part
        _sync(part)
        _default_mode(part)
        part.replace(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _default_mode(path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
