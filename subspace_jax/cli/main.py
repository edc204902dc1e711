"""The command ``subspace-jax``, thin over the rest."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from subspace_jax.cli import (
    fetch,
    info,
    interpret,
    language,
    language_generate,
    language_runs,
    methods,
    output,
    plan,
    processes,
    shared,
    train,
    vision,
)

_EXAMPLES = """
    subspace-jax methods grassmann                       # which methods there are, and their commands
    subspace-jax configs digits                          # what --config takes
    subspace-jax train --config gcr/digits:k8 --workdir work/digits
    subspace-jax train --help                            # each command's help shows examples of its own
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: Arguments after the program's name; those of the process by default.

    Returns:
      The exit status: 0; 1 where a search finds nothing; 2 for bad input, a full disk, or data or processes that time
      out; 75 after SIGTERM, with the state saved; 76 after too many steps that were not finite; 77 where another
      process was lost; 130 after an interrupt from the keyboard; 141 where the reader of the output has gone, such as
      ``head``, which ends no run.
    """
    return output.quietly(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args, overrides = _parse(argv)
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        # With XLA's default scheduler two devices may run a loop's collectives and those outside it in different
        # orders, and wait for each other for ever.
        flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("subspace_jax").setLevel(logging.INFO)
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
    parser = argparse.ArgumentParser(
        prog="subspace-jax",
        description="Subspace methods in JAX.",
        epilog=shared.example_text(_EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (methods, fetch, train, language_runs, language_generate, language, vision, interpret, plan, info):
        module.add_commands(subparsers)
    args, extra = parser.parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in extra if text.startswith("--config.")]
    unknown = [text for text in extra if not (args.takes_fields and text.startswith("--config."))]
    if unknown:
        hint = " (fields of the config are set by --config.FIELD=VALUE)" if args.takes_fields else ""
        parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    return args, overrides


def _ending(error: BaseException, trains: bool) -> tuple[int | None, str]:
    """Returns exit status and message for what the user can mend; status None for a fault of the program."""
    if isinstance(error, BrokenPipeError) and not trains:
        return None, ""
    if isinstance(error, shared.NothingFoundError):
        return 1, str(error)
    if isinstance(error, ValueError | OSError) or (isinstance(error, ImportError) and "pip install" in str(error)):
        # Of a line each; JAX adds longer ones for those who read a traceback.
        notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in note]
        return 2, f"{error} ({', '.join(notes)})" if notes else str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; the same command resumes from the last checkpoint" if trains else "stopped"
    return processes.ending(error)


if __name__ == "__main__":
    sys.exit(main())
