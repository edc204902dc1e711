"""What commands share: how one is added, arguments of several, and the file with a run's result."""

import argparse
import difflib
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[[argparse.Namespace, list[str]], None]


class NothingFoundError(ValueError):
    """A search has no result."""


def add_command(
    commands, name: str, summary: str, run: Run, examples: str, *, fields: bool = False, trains: bool = False
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
      commands: What ``ArgumentParser.add_subparsers`` returns.
      name: Name of the command.
      summary: What it does, in one clause.
      run: Called with the arguments and with the texts ``FIELD=VALUE`` of ``--config.FIELD=VALUE``.
      examples: Text of ``--help``.
      fields: Whether the command takes ``--config.FIELD=VALUE``.
      trains: Whether it writes checkpoints to a workdir and may run in several processes.

    Returns:
      The parser of the command.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=example_text(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, takes_fields=fields, trains=trains)
    return parser


def example_text(examples: str) -> str:
    """Returns the part of a help text that shows examples."""
    return "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds ``--config``, required where there is no default."""
    parser.add_argument(
        "--config",
        required=default is None,
        default=default,
        metavar="NAME[:VARIANT]",
        help="name that `subspace-jax configs` lists, or a Python file with get_config(), which is run; any of its "
        "fields is set by --config.FIELD=VALUE",
    )


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds the folder of a run, and ``--quiet``."""
    parser.add_argument("--workdir", metavar="DIR", help="folder for checkpoints, metrics and curves")
    parser.add_argument("--quiet", action="store_true", help="no progress: only evaluations, warnings and the result")


def add_restart(parser: argparse.ArgumentParser) -> None:
    """Adds what is done with a run that the workdir holds."""
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin at step 0 where the workdir holds a run, which is kept there in a folder earlier.N",
    )
    parser.add_argument(
        "--change-seed",
        action="store_true",
        help="resume with another seed than that of the run in the workdir, which is refused otherwise",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that read the config of a run."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="import the task that the run's config.json names though it is not of this library, which runs its code",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a run's checkpoint: ``--step`` or ``--best``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    which.add_argument(
        "--best", action="store_true", help="the best checkpoint, by the metric train.best of the config"
    )


def check_paths(args: argparse.Namespace) -> None:
    """Raises an error for an empty path, a model that is not there, and no workdir or the current folder as one."""
    for name in ("workdir", "model", "adapter", "out"):
        if getattr(args, name, None) == "":  # an unset variable of the shell
            raise ValueError(f"--{name}: expected a folder{' or file' * (name == 'out')}, got an empty path")
    if getattr(args, "config", None) == "":
        raise ValueError("--config: expected a Python file, got an empty path")
    if not args.trains and getattr(args, "model", None):
        check_model_folder(args.model)
    if args.trains and args.workdir is None:
        if getattr(args, "dry_run", False) or getattr(args, "print_config", False):
            return
        raise ValueError("--workdir: expected a folder for the run's files, such as --workdir work/run")
    if args.trains and os.path.normpath(args.workdir) == os.curdir:
        raise ValueError(f"--workdir: expected a folder of the run's own, got {args.workdir!r}, the current one")


def check_model_folder(folder: str, argument: str = "--model") -> None:
    """Raises a FileNotFoundError for a model that is not there; it names the nearest one, or the command for it."""
    if not folder:
        raise ValueError(f"{argument}: expected a folder or GGUF file, as the config names none")
    if not _holds_anything(folder):
        what = "nothing in" if os.path.isdir(os.path.expanduser(folder)) else "no"
        raise FileNotFoundError(f"{argument}: there is {what} {folder}{_model_hint(folder)}")


def _holds_anything(path: str) -> bool:
    """Whether a path is that of a file, or of a folder that is not empty."""
    path = os.path.expanduser(path)
    return bool(os.listdir(path)) if os.path.isdir(path) else os.path.exists(path)


def _model_hint(folder: str) -> str:
    """Returns a hint at the model that a missing folder may mean: one on disk, or one that `fetch` writes."""
    from subspace_jax import interop

    where, name = os.path.normpath(folder), os.path.basename(os.path.normpath(folder)).lower()
    models = {n: p.folder for n, p in interop.PACKAGES.items() if p.folder.startswith("work/models/")}
    known = [n for n, there in models.items() if there == where]
    near = None if os.path.isdir(where) else _nearest_path(Path(where).expanduser())
    if not known and near is None:
        known = [n for n in models if n in name] or difflib.get_close_matches(name, models, n=1)
    if known and not _holds_anything(models[known[0]]):
        there = models[known[0]]
        return f"; `subspace-jax fetch {known[0]}` writes {'it' if there == where else there}"
    there = models[known[0]] if known else near
    return f"; did you mean {there}?" if there else ""


def _nearest_path(path: Path) -> Path | None:
    """Returns the existing path whose parts are nearest to those of a path; None where a part has no near one."""
    if path.parent == path:
        return None
    parent = path.parent if path.parent.is_dir() else _nearest_path(path.parent)
    if parent is None or (parent / path.name).exists():
        return parent and parent / path.name
    try:
        names = {name.lower(): name for name in sorted(os.listdir(parent))}
    except OSError:
        return None
    near = difflib.get_close_matches(path.name.lower(), names, n=1)
    return parent / names[near[0]] if near else None


def tokenizer_of(folder: str) -> str:
    """Returns "bytes" where a model's folder has no tokenizer, "" where it has its own, as any GGUF file has.

    Raises:
      ValueError: There are files of a tokenizer, but no tokenizer.json.
    """
    if os.path.isfile(folder) or os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return ""
    for name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model"):
        if os.path.isfile(os.path.join(folder, name)):
            raise ValueError(
                f"{folder}: expected a tokenizer.json beside {name}; transformers' AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...) writes one, and --tokenizer names one elsewhere"
            )
    return "bytes"


def recipe_of(overrides: list[str]) -> list[str]:
    """Returns the optimizer's fields that go with an adapter method named on the command line, as ``FIELD=VALUE``.

    A config's learning rate is for all parameters, unless it names a method itself.
    """
    from subspace_jax import train

    method = next((text.partition("=")[2] for text in reversed(overrides) if text.startswith("adapter.method=")), "")
    return [f"optim.{name}={value}" for name, value in train.adapter_recipe(method).items()] if method else []


def write_result(workdir: str, result: Mapping[str, float]) -> None:
    """Writes ``result.json``: the scalars of a run's last evaluation, by name."""
    import jax
    import numpy as np

    from subspace_jax import train

    if jax.process_index() == 0:
        numbers = {name: float(value) for name, value in result.items() if np.ndim(value) == 0}
        with train.replacing(Path(workdir) / "result.json") as partial:
            partial.write_text(json.dumps(numbers, indent=2) + "\n")
