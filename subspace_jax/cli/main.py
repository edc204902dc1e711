"""The command ``subspace-jax``, thin over the rest."""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Sequence

from subspace_jax.cli import (
    align,
    attention,
    attention_operators,
    cluster,
    compare,
    compositional,
    compress,
    continual,
    detect,
    factors,
    fetch,
    few_shot,
    hydra,
    info,
    inspect,
    interpret,
    language,
    language_generate,
    language_runs,
    merge_adapters,
    merge_models,
    methods,
    output,
    plan,
    processes,
    project_update,
    sae,
    shared,
    train,
    upgrade,
    vision,
)

_GROUPS = {
    "find": ("methods", "configs", "info", "fetch"),
    "train": ("train", "eval", "plan", "continual", "continual-scores"),
    "language models": (
        "pretrain",
        "finetune",
        "merge",
        "merge-adapters",
        "merge-models",
        "export",
        "generate",
        "perplexity",
        "compress",
    ),
    "images and features": ("accuracy", "features", "few-shot", "probe", "transfer", "upgrade", "detect"),
    "study": (
        "align",
        "attention",
        "attention-operators",
        "class-gates",
        "cluster",
        "compare",
        "compositional",
        "factors",
        "inspect",
        "intrinsic-dimension",
        "project-update",
        "sae",
    ),
}
_EXIT_STATUSES = (
    (0, "done"),
    (1, "a search finds nothing"),
    (2, "bad input, a full disk, or data or processes that time out"),
    (75, "stopped by SIGTERM, with the state saved; the same command resumes"),
    (76, "too many steps in a row were not finite"),
    (77, "another process of the run was lost"),
    (130, "interrupted from the keyboard"),
    (141, "the reader of the output has gone, such as head; it ends no run"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: Arguments after the program's name; those of the process by default.

    Returns:
      The exit status, one of those that ``subspace-jax --help`` lists.
    """
    return output.quietly(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args, overrides = _parse(argv)
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        # With XLA's default scheduler two devices may run a loop's collectives and those outside it in different
        # orders, and wait for each other for ever.
        flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()
    output.log_to_stderr()
    output.silence_threads()
    try:
        shared.check_paths(args)
        if args.trains:
            processes.start(args)
        with output.lasting() if args.trains else contextlib.nullcontext():
            args.run(args, overrides)
    except (Exception, KeyboardInterrupt) as error:
        status, message = _ending(error, args.trains)
        if status is None:
            raise
        print(f"subspace-jax {args.command}: {message}", file=sys.stderr)
        return status
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Returns arguments, and the texts ``FIELD=VALUE`` of ``--config.FIELD=VALUE``."""
    parser = _Parser(prog="subspace-jax", description="Subspace methods in JAX.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.commands = subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for module in (
        methods,
        fetch,
        train,
        language_runs,
        merge_adapters,
        language_generate,
        language,
        merge_models,
        vision,
        few_shot,
        upgrade,
        attention,
        factors,
        hydra,
        interpret,
        align,
        attention_operators,
        cluster,
        compare,
        compositional,
        compress,
        continual,
        detect,
        inspect,
        project_update,
        sae,
        plan,
        info,
    ):
        module.add_commands(subparsers)
    command = next((text for text in (sys.argv[1:] if argv is None else argv) if not text.startswith("-")), "")
    near = difflib.get_close_matches(command, subparsers.choices, n=1)
    if near and command not in near:
        parser.error(f"no command {command!r}; did you mean {near[0]}?")
    args, extra = parser.parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in extra if text.startswith("--config.")]
    unknown = [text for text in extra if not (args.takes_fields and text.startswith("--config."))]
    if unknown:
        hint = " (fields of the config are set by --config.FIELD=VALUE)" if args.takes_fields else ""
        parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    return args, overrides


class _Parser(argparse.ArgumentParser):
    """Its help shows the commands in groups, with an example of each, and the exit statuses."""

    commands: argparse._SubParsersAction

    def format_help(self):
        """Returns the help."""
        summaries = {action.dest: action.help for action in self.commands._get_subactions()}
        grouped = {name for names in _GROUPS.values() for name in names}
        groups = {**_GROUPS, "others": tuple(sorted(summaries.keys() - grouped))}
        lines = [self.format_usage().strip(), "", self.description, "", "commands, with examples:"]
        for group, names in groups.items():
            there = [name for name in names if name in summaries]
            lines += ["", f"  {group}"] if there else []
            for name in there:
                lines += [f"    {name:<20} {summaries[name]}", f"    {'':<20} {self._example(name)}"]
        lines += ["", "exit statuses:", *(f"  {status:>4}  {meaning}" for status, meaning in _EXIT_STATUSES)]
        lines += ["", "subspace-jax COMMAND --help shows the arguments of a command and more examples;"]
        return "\n".join([*lines, "subspace-jax --version prints the version.", ""])

    def _example(self, name):
        """The first example of a command, on one line and without its comment."""
        text = self.commands.choices[name].epilog.partition("examples:")[2].replace("\\\n", " ")
        first = next(line for line in text.splitlines() if line.strip())
        return " ".join(first.partition("  #")[0].split())


class _Version(argparse.Action):
    """Prints the versions of this package and of JAX; no backend is started."""

    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(f"subspace-jax {version('subspace-jax')} (jax {version('jax')})")
        parser.exit()


def _ending(error: BaseException, trains: bool) -> tuple[int | None, str]:
    """Returns exit status and message for what the user can mend; status None for a fault of the program."""
    if isinstance(error, BrokenPipeError) and not trains:
        return None, ""
    if isinstance(error, shared.NothingFoundError):
        return 1, str(error)
    if isinstance(error, ValueError | OSError) or (isinstance(error, ImportError) and "pip install" in str(error)):
        # Of a line each; JAX adds longer ones for those who read a traceback.
        notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
        # Without the number that str() puts before it.
        plain = isinstance(error, OSError) and error.strerror and error.filename is None
        message = str(error.strerror if plain else error)
        return 2, f"{message} ({', '.join(notes)})" if notes else message
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; the same command resumes from the last checkpoint" if trains else "stopped"
    return processes.ending(error)


if __name__ == "__main__":
    sys.exit(main())
