"""Adding methods to an object that is built already: its class becomes a subclass of itself.

Unlike a wrapper, this keeps attributes, parameter names and ``isinstance``; unlike patched methods, it
survives copying and pickling.
"""

from __future__ import annotations

from typing import Any

_MADE: dict[tuple[type[Any], type[Any]], type[Any]] = {}


class Mixed:
    """Base of mixins: copies and pickles by the names of the mixin and of the original class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Name the two classes: the one made of them cannot be found by its name."""
        mixin, base = type(self).__bases__[:2]
        return (_rebuild, (mixin, base), *object.__reduce_ex__(self, 2)[2:])


def mixed_class(mixin: type[Any], base: type[Any]) -> type[Any]:
    """The class with the methods of ``mixin`` before those of ``base``, under the name of ``base``.

    Args:
        mixin: A subclass of :class:`Mixed`.
        base: The original class.
    """
    key = (mixin, base)
    if key not in _MADE:
        namespace = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        metaclass: Any = type(base)
        _MADE[key] = metaclass(base.__name__, key, namespace)
    return _MADE[key]


def _rebuild(mixin: type[Any], base: type[Any]) -> Any:
    """Make an empty object for pickle and copy to fill."""
    made = mixed_class(mixin, base)
    return object.__new__(made)
