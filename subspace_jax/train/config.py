"""Configs: read from a Python file, overridden on the command line, checked before anything runs."""

import ast
import difflib
import importlib.machinery
import importlib.util
import inspect
import json
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from subspace_jax.config_files import find_config
from subspace_jax.train import optimizer
from subspace_jax.train.fields import as_type_of, flatten, shown, type_name
from subspace_jax.train.workdir import replacing

# Groups of keyword arguments, whose names the optimizer knows and checks.
_ARGUMENTS = ("optim.kwargs", "optim.manifold.kwargs")


def default_config() -> ConfigDict:
    """Returns the fields that every run has; a task adds its own (``data``, ``model``, …).

    ``train.steps`` counts steps; where it is 0, ``train.epochs`` counts passes over the training set.  A phase with a
    number of steps of its own takes at most ``train.steps``, and ignores ``train.epochs``.  ``eval_every`` and
    ``checkpoint_every`` count steps, 0 meaning those of an epoch; a kill costs no more than ``checkpoint_every`` of
    them, for a checkpoint is begun twice as often.  A batch may take ``data_timeout`` seconds, and a run stops after
    ``max_skipped`` steps in a row that were not finite; 0 means never, for both.  A phase ends after ``patience``
    evaluations without a better ``best`` metric; 0 means at its last step.  See :class:`subspace_jax.train.Run` for the
    others.
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
                "patience": 0,
                "accumulate": 1,
                "remat": "none",
                "finite_check": "state",
                "profile_at": 0,
                "data_timeout": 900.0,
                "max_skipped": 100,
                "wandb": "",
            },
            "optim": optimizer.default_config(),
        }
    )


def load_config(spec: str) -> ConfigDict:
    """Runs ``get_config`` of a Python file, which is code and may do whatever its user may: read it before you run it.

    Args:
      spec: Path of the file, or name of a config of the library, such as ``gcr/digits``; ``gcr/digits:k8`` passes
        ``"k8"`` to ``get_config``.

    Returns:
      The config, locked against unknown fields.

    Raises:
      FileNotFoundError: There is no such file; the message names close ones.
      ValueError: The file is no Python, raises, has no ``get_config`` that returns a config, or sets an unknown field
        or a value of the wrong type; file and line are named.
    """
    path, _, variant = spec.partition(":")
    file = find_config(path)
    if file.suffix != ".py":
        raise ValueError(f"--config: expected a Python file (.py) with a function get_config(), got {path}")
    config = _run_file(spec, file, variant)
    return config.lock()


def override(config: ConfigDict, settings: Iterable[str]) -> ConfigDict:
    """Sets fields of a config from ``a.b=value`` texts.

    Args:
      config: The config; it is left as it was.
      settings: Assignments with dotted names; values are Python literals, text needs no quotes.  A field that holds a
        tuple takes ``(4, 8)``, ``[4, 8]`` and ``4,8``.  Fields of ``optim.kwargs`` and ``optim.manifold.kwargs`` may be
        new.  Another ``optim.name`` or ``optim.manifold.name`` drops the keyword arguments of the optimizer before.

    Returns:
      The changed config.

    Raises:
      ValueError: A field is unknown (the nearest known one is named), or a value is of another type.
    """
    config = config.copy_and_resolve_references().lock()
    settings = list(settings)
    chosen, fields = dict(setting.partition("=")[::2] for setting in settings), flatten(config)
    for path in _ARGUMENTS:
        name = path.replace("kwargs", "name")
        if name in chosen and chosen[name] != fields.get(name, chosen[name]):
            owner = config.optim if path == _ARGUMENTS[0] else config.optim.manifold
            with owner.unlocked():
                owner.kwargs = ConfigDict()
    known = flatten(config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--config.{name}: expected --config.{name}=VALUE")
        *groups, field = name.split(".")
        if name not in known and ".".join(groups) not in _ARGUMENTS:
            near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.0) or ["--config.FIELD=VALUE"]
            inside = [key for key in known if key.startswith(f"{name}.")]
            inside = inside or ([f"{name}.NAME"] if name in _ARGUMENTS else [])
            hint = f"it is a group; set one of {', '.join(inside)}" if inside else f"did you mean {near[0]}?"
            raise ValueError(f"--config.{name}: unknown field; {hint}")
        group = config
        for part in groups:
            group = group[part]
        with group.unlocked():
            group[field] = _parse(name, text, known.get(name))
    return config


def save_config(config: ConfigDict, path: str | Path) -> None:
    """Writes a config as JSON, all at once."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(path: str | Path) -> ConfigDict:
    """Reads what :func:`save_config` wrote, tuples as such; raises ValueError for a file that is no config."""
    try:
        fields = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # not JSON, not even text, or too deep
        raise ValueError(f"{path} is no config of a run: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no config of a run: expected a JSON object, got {type(fields).__name__}")
    return ConfigDict(_with_tuples(fields))


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples, and a config no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def differing_fields(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns ``"name: old -> new"`` for every field in which two configs differ, after a round trip through JSON."""
    before, after = (flatten(ConfigDict(json.loads(json.dumps(c.to_dict())))) for c in (old, new))
    names = sorted(before.keys() | after.keys())
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _parse(name: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what no literal is, has many names
        value = {"true": True, "false": False}.get(text, text)
    try:
        return as_type_of(old, value)
    except TypeError:
        raise ValueError(f"--config.{name}: expected {type_name(old)}, got {shown(text)}") from None


def _run_file(spec: str, file: Path, variant: str) -> Any:
    """Runs the file, whose errors all become ValueErrors of one line with file and line."""
    name = f"subspace_jax_config_{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    try:
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ValueError("it has no function get_config()")
        takes_variant = bool(inspect.signature(module.get_config).parameters)
        if variant and not takes_variant:
            raise ValueError(f"its get_config takes no variant, got {variant!r}")
        config = module.get_config(variant) if variant else module.get_config()
    # A file of somebody's own may raise anything, and may call sys.exit().
    except (Exception, SystemExit) as error:
        raise ValueError(f"--config {spec}: {_message(error, file)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config {spec}: get_config() returned {type(config).__name__}, expected an ml_collections.ConfigDict"
        )
    return config


def _message(error: BaseException, file: Path) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename or file}:{error.lineno or 1}: no Python: {error.msg}"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "examples":
        return "its task lies in examples/, which comes with a clone of the repository and not with the package"
    text = " ".join(text.split())[:1000] or type(error).__name__
    if type(error) is ValueError:
        return text
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"{file}:{lines[-1]}: " if lines else ""
    return (
        f"{where}{text}" if isinstance(error, AttributeError | KeyError) else f"{where}{type(error).__name__}: {text}"
    )
