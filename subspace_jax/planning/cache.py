"""Plans of earlier runs of the command, by all that a plan depends on."""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import subspace_jax
from subspace_jax.planning.chips import find_topology
from subspace_jax.planning.meshes import mesh_sizes
from subspace_jax.planning.record import Plan
from subspace_jax.train.experiment import task_module
from subspace_jax.train.fields import flatten
from subspace_jax.train.workdir import replacing

log = logging.getLogger(__name__)

_PACKAGES = ("subspace-jax", "jax", "jaxlib", "libtpu")
_ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_")


def plan_key(
    config: ConfigDict, topology: str, mesh: Mapping[str, int] | None = None, *, evaluations: bool = True
) -> dict[str, Any]:
    """Returns all that the plans of :func:`subspace_jax.planning.plan_run` depend on, as JSON values.

    These are the complete config with the sizes of the mesh, the topology, versions of packages, environment variables
    of JAX and XLA, a digest of the source files of this library and of a task of the user's own, and the state of files
    and folders that the config names.

    Args:
      config: See :func:`subspace_jax.planning.plan_run`, as for other arguments and errors.
      topology: Likewise.
      mesh: Likewise.
      evaluations: Likewise.
    """
    _, config = task_module(config)
    sizes = mesh_sizes(config.mesh if mesh is None else mesh, topology, find_topology(topology)[1])
    paths = {value for value in flatten(config).values() if isinstance(value, str) and value and os.path.exists(value)}
    key = {
        "config": config.to_dict() | {"mesh": sizes},
        "topology": topology,
        "evaluations": evaluations,
        "versions": {name: _version(name) for name in _PACKAGES},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_ENVIRONMENT)},
        "sources": _digest(_source_files(config.task)),
        "paths": {path: _path_state(Path(path)) for path in sorted(paths)},
    }
    return json.loads(json.dumps(key, default=repr))


def read_plans(key: Mapping[str, Any]) -> list[Plan] | None:
    """Returns the plans of a key from the cache; None if there are none, or their file is damaged."""
    try:
        stored = json.loads(_file(key).read_text())
        if stored["key"] != key or stored["sha256"] != _json_digest(stored["plans"]):
            return None
        return [Plan.from_dict(values) for values in stored["plans"]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def write_plans(key: Mapping[str, Any], plans: Iterable[Plan]) -> None:
    """Writes plans to the cache; a failure is logged as a warning, since planning works without it."""
    values = [plan.as_dict() for plan in plans]
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(
                json.dumps({"key": key, "sha256": _json_digest(values), "plans": values}, indent=1) + "\n"
            )
    except OSError as error:
        log.warning("the plan is not cached: %s", error)


def _file(key: Mapping[str, Any]) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "subspace_jax" / "plans" / f"{_json_digest(key)}.json"


def _json_digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _source_files(task: str) -> list[Path]:
    """Returns the source files of this library, and those beside or below a task that is none of its own."""
    library = Path(subspace_jax.__file__).parent
    files = sorted(library.rglob("*.py"))
    name = task.partition(".")[0]
    spec = None if name == library.name else importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        files += sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.py"))
    elif spec is not None and spec.origin:
        files += sorted(Path(spec.origin).parent.glob("*.py"))
    return files


def _digest(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in filter(Path.is_file, files):  # editors leave links to nowhere
        total.update(f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _path_state(path: Path) -> Any:
    """Returns what a plan may depend on: the JSON files of a model's folder, sizes and times elsewhere."""
    if (path / "config.json").is_file():
        return _digest(sorted(path.glob("*.json")))
    if not path.is_dir():
        return _size_and_time(path)
    # The folders of a set of images: their times change with their entries.
    return [_size_and_time(folder) for folder in (path, *sorted(p for p in path.glob("*") if p.is_dir()))]


def _size_and_time(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
