"""SHA-256 digests of the files of a checkpoint, which detect a byte that changed later.

Each process hashes the arrays it wrote, see :mod:`subspace_jax.train.arrays_handler`; process 0 adds the other files
and writes all digests into the checkpoint before it is complete.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from subspace_jax.train.reading import DamagedError

_NAME = "digests.json"
# Orbax writes these after all others; nothing is read from them.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_own(folder: Path, process: int) -> None:
    """Writes the digests of the arrays that one process wrote below ``folder``, the ``state`` item."""
    names = _names(folder / f"ocdbt.process_{process}")
    _write(
        folder / f"digests.process_{process}.json", _digests(folder, [f"ocdbt.process_{process}/{n}" for n in names])
    )


def write(folder: Path) -> None:
    """Writes the digests of all files of a checkpoint, on process 0 after every process has called :func:`write_own`.

    Args:
      folder: The checkpoint, before it gets its final name.
    """
    known = {}
    for part in sorted((folder / "state").glob("digests.process_*.json")):
        known |= {f"state/{name}": value for name, value in json.loads(part.read_text()).items()}
        part.unlink()
    known |= _digests(folder, [name for name in _names(folder) if name not in known and name not in _LATE])
    _write(folder / _NAME, {"sha256": known, "of_these": _of_these(known)})


def read(folder: Path) -> dict[str, str] | None:
    """Returns the digests by file name, or None where they have no file; raises DamagedError for a damaged one."""
    file = folder / _NAME
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, or not even text
        raise DamagedError(f"{file} is no JSON: {error}") from None
    known = found.get("sha256") if isinstance(found, dict) else None
    if not isinstance(known, dict) or found.get("of_these") != _of_these(known):
        raise DamagedError(f"{file} holds other digests than were written")
    return known


def check(folder: Path, known: Mapping[str, str], names: Iterable[str] | None = None) -> None:
    """Compares files with their digests.

    Args:
      folder: The checkpoint.
      known: The digests, from :func:`read`.
      names: Which files; all by default.

    Raises:
      DamagedError: A file is missing or has other bytes.
      OSError: A file can't be read.
    """
    names = list(known if names is None else names)
    if lost := [name for name in names if not (folder / name).is_file()]:
        raise DamagedError(f"{folder / lost[0]} is not there")
    for name, value in _digests(folder, names).items():
        if value != known[name]:
            raise DamagedError(f"{folder / name} holds other bytes than were written")


def _of_these(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # block by block

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _write(file: Path, digests: Mapping[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(digests, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
