"""Real text without a download: the documentation inside installed Python packages."""

import ast
import functools
import importlib.util
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

STANDARD_LIBRARY = "stdlib"
_SHORTEST = 80  # characters; shorter docstrings are mostly one phrase


def docstrings(packages: Sequence[str] = (STANDARD_LIBRARY,), split: str = "train") -> list[str]:
    """Collects the docstrings of modules, classes and functions, in English prose of some 80 characters and more.

    Sources are parsed, not imported.  The order is that of file names, and equal texts are taken once.  A tenth of the
    files, by a hash of their names, is the split "validation".  What is found depends on the versions installed: the
    standard library of Python 3.11 gives about 1.6 million characters.

    Args:
      packages: Names of installed packages; "stdlib" for the standard library.
      split: "train" or "validation".

    Returns:
      One text for each docstring.

    Raises:
      ValueError: A package is not installed or has no sources, or the split is unknown.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    return list(_docstrings(tuple(packages))[split])


@functools.cache
def _docstrings(packages: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    texts: dict[str, dict[str, None]] = {"train": {}, "validation": {}}
    for package in packages:
        root = _root(package)
        files = sorted(root.rglob("*.py"))
        for file in files:
            name = f"{package}/{file.relative_to(root).as_posix()}"
            if any(part in ("test", "tests", "site-packages", "idle_test") for part in file.parts[len(root.parts) :]):
                continue
            own = texts["validation" if zlib.crc32(name.encode()) % 10 == 0 else "train"]
            own.update(dict.fromkeys(_of_file(file)))
    for text in texts["train"]:
        texts["validation"].pop(text, None)
    return {split: tuple(found) for split, found in texts.items()}


def _root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"packages: {package!r} is no installed package with sources")
    return Path(next(iter(spec.submodule_search_locations)))


def _of_file(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # templates and files of other versions
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text
