"""Checks of config fields: types of a template, ranges, names with the nearest known one."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

# Steps are counted in int32, and all that a step multiplies by is float32.
LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
# A path or a list of rules; longer is no field but a file.
_LONGEST_TEXT = 10_000
_LARGEST_BATCH = 2**20


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns dotted name to value."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_type_of(old: Any, value: Any) -> Any:
    """Returns the value as the type of the old one.

    Integers become floats, and tuples and lists each other, as JSON has lists only.  A field that was None takes
    anything.

    Raises:
      TypeError: The value is of another type.
    """
    if old is None:
        return value
    if isinstance(old, tuple | list) and isinstance(value, tuple | list):
        return type(old)(as_type_of(old[0], item) for item in value) if old else type(old)(value)
    if isinstance(old, float) and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise TypeError from None
    if type(value) is not type(old):
        raise TypeError
    return value


def complete_config(config: ConfigDict, template: ConfigDict) -> ConfigDict:
    """Returns a config with the types of a template, and with the template's values of fields that it lacks.

    Args:
      config: From a Python file, or from JSON that an earlier version may have written; it may have more fields.
      template: The fields with their defaults.

    Raises:
      ValueError: A field is of another type; the message names it.
    """
    return ConfigDict(_completed(config.to_dict(), template.to_dict(), "")).lock()


def _completed(found: Mapping[str, Any], template: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    out = dict(found)
    for key, default in template.items():
        name, value = prefix + key, found.get(key, default)
        if isinstance(default, dict):
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected the fields {', '.join(default)}, got {shown(value)}")
            # Keyword arguments are those of what the config names, not those of the template's choice.
            out[key] = value if key == "kwargs" else _completed(value, default, f"{name}.")
            continue
        try:
            out[key] = as_type_of(default, value)
        except TypeError:
            raise ValueError(f"{name}: expected {type_name(default)}, got {shown(value)}") from None
    return out


def type_name(value: Any) -> str:
    """Returns the type of a field in words, with an example."""
    return f"{type(value).__name__} such as {value!r}"


def shown(value: Any) -> str:
    """Returns a value as it is shown in a message, at most a line of it."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'NAME'?"`` for a known name that is close, else nothing."""
    near = difflib.get_close_matches(str(name)[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises a ValueError that names the field, the choices and the nearest of them, unless the value is one."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {shown(value)}{nearest(value, known)}")


def check_at_least(name: str, value: float, low: float, *, above: bool = False) -> None:
    """Raises a ValueError unless a number is at least ``low`` (or above it), and one that the type of steps holds."""
    least = f"above {low}" if above else f"at least {low}"
    if isinstance(value, int):
        low += above
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
        if value > LARGEST_INT:
            raise ValueError(f"{name}: expected at most {LARGEST_INT}, got {shown(value)}")
    elif not (low < value if above else low <= value) or not value <= _LARGEST_FLOAT:  # NaN is in no range
        raise ValueError(f"{name}: expected a finite number {least}, got {value}")


def check_share(name: str, value: float) -> None:
    """Raises a ValueError unless a number is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def check_run_fields(config: ConfigDict) -> None:
    """Checks the fields that every run has, but for those of the optimizer.

    Raises:
      ValueError: A number is out of range, or a text is longer than any name.
    """
    for name, value in flatten(config).items():
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise ValueError(f"{name}: expected at most {_LONGEST_TEXT} characters, got {len(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
        if isinstance(value, int) and name != "seed" and abs(value) > LARGEST_INT:
            raise ValueError(f"{name}: expected at most {LARGEST_INT}, got {shown(value)}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed: expected at least 0 and below 2^32, got {shown(config.seed)}")
    for name in ("batch_size", "eval_batch_size"):
        if config.get("data", {}).get(name, 0) > _LARGEST_BATCH:
            raise ValueError(f"data.{name}: expected at most {_LARGEST_BATCH} examples, got {config.data[name]}")
    fields = config.train
    check_at_least("train.epochs", fields.epochs, 0)
    if fields.steps < 0 or (fields.steps == 0 and not fields.epochs > 0):
        raise ValueError(
            f"train.steps, train.epochs: expected a run of at least 1 step, got {fields.steps} steps, "
            f"{fields.epochs} epochs"
        )
    for name, what in (("log_every", "step"), ("keep", "checkpoint"), ("accumulate", "micro-batch")):
        if fields[name] < 1:
            raise ValueError(f"train.{name}: expected at least 1 {what}, got {fields[name]}")
    for name in ("eval_every", "checkpoint_every", "profile_at"):
        if fields[name] < 0:
            raise ValueError(f"train.{name}: expected 0 or a number of steps, got {fields[name]}")
    for name in ("data_timeout", "max_skipped", "patience"):
        check_at_least(f"train.{name}", fields[name], 0)
