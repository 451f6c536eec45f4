"""The errors nlsurgery raises: each says where, what was expected, what came and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeryError(Exception):
    """Base of every error that nlsurgery raises on purpose."""


class RecipeError(SurgeryError, ValueError):
    """A recipe (YAML or mapping) that cannot be read, or says something not allowed."""


class SelectorError(RecipeError):
    """A recipe entry that matches no place in the model, or one that cannot take a block."""


class BlockError(SurgeryError, ValueError):
    """A block built with options it does not have, or called on input it cannot take."""


class ModelError(SurgeryError, TypeError):
    """A model that cannot be operated on as it is (wrapped, compiled, scripted, not traceable)."""


class CheckpointError(SurgeryError, ValueError):
    """A checkpoint that cannot be read, or does not belong to the model."""


class VerifyError(SurgeryError, RuntimeError):
    """An inserted block that does not run, runs twice, or no longer affects the output."""


class DataError(SurgeryError, ValueError):
    """A data set, image or video file that cannot be used."""


def close_names(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Format the known names nearest to ``name`` as a hint, ``""`` when none is near.

    Args:
        name: What the user wrote.
        known: What would have been accepted.
        limit: How many names to offer at most.

    Returns:
        ``" (did you mean 'a' or 'b'?)"``, or the empty string.
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=limit, cutoff=0.5)
    if not near:
        return ""
    return " (did you mean " + " or ".join(repr(item) for item in near) + "?)"
