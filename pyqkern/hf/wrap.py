"""Functions of other libraries that have to know quantized layers, and offer no place to say so."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(holder: Any, name: str, around: Callable[..., Any]) -> None:
    """Has `around(original, *arguments)` called for the function `name` of a module or class; once.

    The arguments of a class method begin with the class.
    """
    found = inspect.getattr_static(holder, name)
    original = found.__func__ if isinstance(found, classmethod) else found
    if hasattr(original, "_of_pyqkern"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped._of_pyqkern = True  # type: ignore[attr-defined]
    setattr(holder, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)
