"""JSON files that hold one object, such as the settings in a Hugging Face folder."""

import json
import os
from pathlib import Path
from typing import Any


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file with one JSON object.

    Args:
      path: The file, UTF-8, with or without a byte order mark.

    Returns:
      The object.

    Raises:
      ValueError: The file is not UTF-8, not JSON, too deeply nested, or holds something else than an object; it is
        named.
      OSError: It can't be read.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
