"""JSON files that hold one object, such as the configs of a Hugging Face checkpoint."""

import collections
import json
import os
import pathlib
import reprlib
from typing import Any

_MAX_BYTES = 100_000_000


def read_json_object(path: str | os.PathLike, *, unique: bool = False) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
      path: The file, UTF-8 with or without a byte order mark.
      unique: Whether a repeated name in an object is an error; otherwise the last value counts.

    Returns:
      The object.

    Raises:
      ValueError: The file is not JSON in UTF-8, too large, too deeply nested, or holds no object.
      OSError: It can't be read.
    """
    path = pathlib.Path(path)
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_BYTES} bytes, got {size}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique_names if unique else None)
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object as a dict, for ``json.loads(object_pairs_hook=...)``.

    Raises:
      ValueError: A name is repeated.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {reprlib.repr(name)} stands twice")
    return made
