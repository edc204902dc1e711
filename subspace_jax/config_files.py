"""The configs that come with the library: found by name, listed without running them."""

import ast
import difflib
import inspect
import itertools
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parent
# In a wheel they lie in the package; in a clone, beside it.
CONFIGS = next((p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()), _PACKAGE / "configs")


class ConfigFile(NamedTuple):
    """A config file.

    Attributes:
      name: Its name, such as ``gcr/digits``.
      path: Its path.
      summary: First line of its docstring.
      variants: What the docstring says about variants; empty where there are none.
      needs_clone: Whether its task is one of ``examples/``, which no wheel holds.
    """

    name: str
    path: Path
    summary: str
    variants: str
    needs_clone: bool


def config_names() -> list[str]:
    """Returns the names of all configs, such as ``gcr/digits``."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.py"))


def find_config(name: str) -> Path:
    """Returns the file of a config.

    Args:
      name: Path of a Python file, or the name of a config of the library; with or without ``configs/`` and ``.py``.

    Returns:
      Its path.

    Raises:
      FileNotFoundError: There is neither; the message names close ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = name.removeprefix("configs/").removesuffix(".py")
    known = config_names()
    if short in known:
        return CONFIGS / f"{short}.py"
    is_path = path.is_absolute() or path.suffix == ".py"
    near = _near_files(path) if is_path else []
    if not near and not path.is_absolute():
        near = [other for other in known if other.startswith(f"{short.rstrip('/')}/")] or near_names(short, known)
    hint = f"; there is {', '.join(near)}" if near else ""
    raise FileNotFoundError(f"--config: no {'file' if is_path else 'config'} {name}{hint}")


def read_config_file(name: str) -> ConfigFile:
    """Reads the docstring of a config of the library."""
    path = CONFIGS / f"{name}.py"
    source = path.read_text()
    tree = ast.parse(source)
    paragraphs = inspect.cleandoc(ast.get_docstring(tree) or "").replace("``", "").split("\n\n")
    variants = next((text for text in paragraphs if text.startswith("Variants")), "")
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return ConfigFile(name, path, paragraphs[0].split("\n")[0], " ".join(variants.split()), "examples" in imported)


def near_names(name: str, known: list[str]) -> list[str]:
    """Returns up to three known names that resemble a name: as a whole, or in the part after the folder."""
    parts = {}
    for full in known:
        parts.setdefault(full.rpartition("/")[2], []).append(full)
    whole = difflib.get_close_matches(name[:100], known, n=3)
    last = difflib.get_close_matches(name.rpartition("/")[2][:100], parts, n=3)
    return list(dict.fromkeys([*whole, *(full for part in last for full in parts[part])]))[:3]


def _near_files(path: Path) -> list[str]:
    """Config files whose paths come near; in the folder of the path, or as deep below the one above that is there."""
    depth, folder = 0, path if path.is_dir() else path.parent
    while not folder.is_dir() and folder != folder.parent:
        depth, folder = depth + 1, folder.parent
    found = sorted(map(str, itertools.islice(folder.glob("*/" * depth + "*.py"), 2000)))
    if near := difflib.get_close_matches(str(path), found, n=3, cutoff=0.4 if depth == 0 else 0.7):
        return near
    return found[:10] if depth == 0 else []
