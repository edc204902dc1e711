"""What a user's subclass overrides: whether it can be called as it will be, and returns what is expected."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def check_overrides(base: type, instance: Any, keywords: Mapping[str, Iterable[str]] | None = None) -> None:
    """Raises a ValueError for a method of a base class that an object overrides with other parameters.

    Args:
      base: The base class.
      instance: An object of a subclass.
      keywords: Method to the names that it is called with, where the base class takes any.
    """
    for name, method in vars(base).items():
        if not inspect.isfunction(method) or name.startswith("_"):
            continue
        parameters = list(inspect.signature(method).parameters.values())[1:]
        places = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
        named = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY] + list((keywords or {}).get(name, ()))
        taken = inspect.signature(getattr(instance, name))
        try:
            taken.bind(*places, **dict.fromkeys(named))
        except TypeError:
            expected = ", ".join([*places, "*", *named] if named else places)
            message = f"{type(instance).__name__}.{name}: expected the parameters ({expected}), got {taken}"
            raise ValueError(message) from None


def pair(where: str, found: Any, expected: str) -> tuple[Any, Any]:
    """Returns what a method returned as a pair; raises a ValueError where it is none.

    Args:
      where: What the message begins with.
      found: What the method returned.
      expected: What it should have returned.
    """
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ValueError(f"{where}: expected {expected}, got {form(found)}")
    return found[0], found[1]


def form(value: Any) -> str:
    """Returns the form of a value in words: of arrays dtype and shape, of others the type."""
    if isinstance(value, tuple):
        return f"({', '.join(map(form, value))})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    return type(value).__name__
