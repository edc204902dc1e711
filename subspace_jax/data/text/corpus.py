"""Text without a download: the documentation in installed Python packages."""

import ast
import functools
import importlib.util
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from subspace_jax.data.text.records import Completion

STANDARD_LIBRARY = "stdlib"
_SHORTEST = 80  # characters; shorter docstrings are mostly one phrase
_SUMMARY = (20, 200)  # characters of a function's summary; its signature has at most as many


def docstrings(packages: Sequence[str] = (STANDARD_LIBRARY,), split: str = "train") -> list[str]:
    """Returns the docstrings of modules, classes and functions of 80 characters and more.

    Sources are parsed, not imported.  The order is that of file names, without duplicates.  A tenth of the files, by a
    hash of their names, is the split "validation".  The result depends on the installed versions: the standard library
    of Python 3.11 gives about 1.6 million characters.

    Args:
      packages: Names of installed packages; "stdlib" for the standard library.
      split: "train" or "validation".

    Returns:
      One text for each docstring.

    Raises:
      ValueError: A package is not installed or has no sources, or the split is unknown.
    """
    return _texts(packages, split, _docstrings_of)


def function_summaries(packages: Sequence[str] = (STANDARD_LIBRARY,), split: str = "train") -> list[Completion]:
    """Returns functions and methods with the first paragraph of their docstring, of 20 to 200 characters.

    A prompt is the signature, ``"split(s, sep=None): "``.  Files and splits are those of :func:`docstrings`, so that
    "validation" here and "train" there are disjoint.

    Args:
      packages: Names of installed packages; "stdlib" for the standard library.
      split: "train" or "validation".

    Returns:
      One example for each function, without duplicates.

    Raises:
      ValueError: A package is not installed or has no sources, or the split is unknown.
    """
    return _texts(packages, split, _summaries_of)


def _texts(packages: Sequence[str], split: str, of_file: Callable) -> list:
    if isinstance(packages, str):
        raise ValueError(f"packages: expected names in a list, got {packages!r}")
    if split not in ("train", "validation"):
        raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
    return list(_both_splits(tuple(packages), of_file)[split])


@functools.cache
def _both_splits(packages: tuple[str, ...], of_file: Callable) -> dict[str, tuple]:
    texts: dict[str, dict[Any, None]] = {"train": {}, "validation": {}}
    for package in packages:
        root = _root(package)
        files = sorted(root.rglob("*.py"))
        for file in files:
            name = f"{package}/{file.relative_to(root).as_posix()}"
            if any(part in ("test", "tests", "site-packages", "idle_test") for part in file.parts[len(root.parts) :]):
                continue
            own = texts["validation" if zlib.crc32(name.encode()) % 10 == 0 else "train"]
            own.update(dict.fromkeys(of_file(file)))
    for text in texts["train"]:
        texts["validation"].pop(text, None)
    return {split: tuple(found) for split, found in texts.items()}


def _root(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(package)
    except Exception:  # a package above it is imported, which may raise anything
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"packages: {package!r} is no installed package with sources")
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings_of(file: Path) -> Iterator[str]:
    for node in _nodes(file):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text


def _summaries_of(file: Path) -> Iterator[Completion]:
    for node in _nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            prompt = f"{node.name}({ast.unparse(node.args)}): "
            if _SUMMARY[0] <= len(first) <= _SUMMARY[1] and len(prompt) <= _SUMMARY[1]:
                yield Completion(prompt, first)


def _nodes(file: Path) -> Iterator[ast.AST]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):  # templates, files of other versions, tests
        return
    yield from ast.walk(tree)
