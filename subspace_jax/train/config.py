"""Configs: read from a Python file, overridden on the command line, checked before anything runs."""

import ast
import difflib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from subspace_jax.train import optimizer
from subspace_jax.train.workdir import replacing


def default_config() -> ConfigDict:
    """Returns the fields that every run has; a task adds its own (``data``, ``model``, …).

    ``train.steps`` counts steps; where it is 0, ``train.epochs`` counts passes over the training set.  ``eval_every``
    and ``checkpoint_every`` count steps, 0 meaning those of an epoch; a kill costs no more than ``checkpoint_every``
    of them, for a checkpoint is begun twice as often.  A batch may take ``data_timeout`` seconds, and a run stops
    after ``max_skipped`` steps in a row that were not finite; 0 means never, for both.  See
    :func:`subspace_jax.train.fit` for the others.
    """
    return ConfigDict(
        {
            "task": "",
            "seed": 0,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "train": {
                "steps": 0,
                "epochs": 10.0,
                "log_every": 20,
                "eval_every": 0,
                "checkpoint_every": 0,
                "keep": 2,
                "best": "min:loss",
                "accumulate": 1,
                "remat": "none",
                "profile_at": 0,
                "data_timeout": 900.0,
                "max_skipped": 100,
            },
            "optim": optimizer.default_config(),
        }
    )


def load_config(spec: str) -> ConfigDict:
    """Runs ``get_config`` of a Python file.

    Args:
      spec: Path of the file; ``path.py:variant`` hands ``variant`` to ``get_config``.

    Returns:
      The config, locked against unknown fields.

    Raises:
      FileNotFoundError: There is no such file; the message names close ones.
      ValueError: The file has no ``get_config``, or sets an unknown field or a value of the wrong type.
    """
    path, _, variant = spec.partition(":")
    file = Path(path)
    if not file.is_file():
        there = [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else []
        near = difflib.get_close_matches(path, there, n=3, cutoff=0.4) or there
        hint = f"; there is {', '.join(near)}" if near else ""
        raise FileNotFoundError(f"--config: no file {path}{hint}")
    module_spec = importlib.util.spec_from_file_location(f"subspace_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config()")
        takes_variant = bool(inspect.signature(module.get_config).parameters)
        if variant and not takes_variant:
            raise ValueError(f"its get_config takes no variant, got {variant!r}")
        config = module.get_config(variant) if variant else module.get_config()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--config {spec}: {_message(error)}") from error
    return config.lock()


def override(config: ConfigDict, settings: Iterable[str]) -> ConfigDict:
    """Sets fields of a config from ``a.b=value`` texts.

    Args:
      config: The config; it is left as it was.
      settings: Assignments with dotted names; values are Python literals, text needs no quotes.

    Returns:
      The changed config.

    Raises:
      ValueError: A field is unknown (the nearest known one is named), or a value is of another type.
    """
    config = config.copy_and_resolve_references().lock()
    known = _flatten(config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--config.{name}: expected --config.{name}=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            inside = [key for key in known if key.startswith(f"{name}.")]
            hint = f"it is a group; set one of {', '.join(inside)}" if inside else f"did you mean {near[0]}?"
            raise ValueError(f"--config.{name}: unknown field; {hint}")
        *groups, field = name.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[field] = _parse(name, text, known[name])
    return config


def save_config(config: ConfigDict, path: str | Path) -> None:
    """Writes a config as JSON, all at once."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(path: str | Path) -> ConfigDict:
    """Reads what :func:`save_config` wrote; raises ValueError for a file that is no config."""
    try:
        fields = json.loads(Path(path).read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is no config of a run: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no config of a run: expected a JSON object, got {type(fields).__name__}")
    return ConfigDict(fields)


def differing_fields(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns ``"name: old -> new"`` for every field in which two configs differ, after a round trip through JSON."""
    before, after = (_flatten(ConfigDict(json.loads(json.dumps(c.to_dict())))) for c in (old, new))
    names = sorted(before.keys() | after.keys())
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _parse(name: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    try:
        return _as_type_of(old, value)
    except TypeError:
        expected = f"{type(old).__name__} such as {old!r}"
        raise ValueError(f"--config.{name}: expected {expected}, got {text!r}") from None


def _as_type_of(old: Any, value: Any) -> Any:
    """Returns the value, whole numbers as floats where those are asked for; raises TypeError for another type."""
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if type(value) is not type(old):
        raise TypeError
    if isinstance(old, tuple | list) and old:
        return type(old)(_as_type_of(old[0], item) for item in value)
    return value


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
