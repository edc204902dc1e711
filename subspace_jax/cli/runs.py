"""What the commands that train share: their flags, a dry run, and the end of a run."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from typing import Any

from subspace_jax.cli import processes, shared


def add_arguments(parser: argparse.ArgumentParser, config: str | None = None) -> None:
    """Adds config (with a default), workdir, seed, what is shown instead of a run, and the processes."""
    shared.add_config(parser, config)
    shared.add_workdir(parser)
    shared.add_restart(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the run, as --config.seed=N")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="print the config, what the run is and its memory, and train nothing",
    )
    instead.add_argument("--print-config", action="store_true", help="print the config with its overrides as JSON")
    processes.add_arguments(parser)


def settings(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Returns the overrides with ``--seed``."""
    return overrides if args.seed is None else [*overrides, f"seed={args.seed}"]


def shown_only(args: argparse.Namespace, overrides: list[str], config: Any) -> bool:
    """Prints the config or a dry run where asked to, and returns whether it was; writes nothing to the workdir."""
    if args.print_config:
        from subspace_jax.train.experiment import task_module

        print(json.dumps(task_module(config)[1].to_dict(), indent=2))
    elif args.dry_run:
        _show(args, settings(args, overrides), config)
    return args.print_config or args.dry_run


def _show(args: argparse.Namespace, overrides: list[str], config: Any) -> None:
    import dataclasses

    from subspace_jax import planning, train

    run = dataclasses.replace(train.build(config), workdir=os.path.abspath(args.workdir) if args.workdir else "")
    print(f"Config\n{json.dumps(run.config.to_dict(), indent=2)}\n")
    print(train.run_summary(run))
    plans = planning.plan_here(run)
    for plan in plans:
        print(f"\n{plan.program}: {planning.memory_text(plan)}")
    if len(plans) < len({id(phase.task) for phase in run.phases}):
        print("\nPhases whose data depend on their state are not planned.")
    print(f"\n{_of_which_device(run.mesh.devices.flat[0].platform)}")
    fields = [f"--config.{field}" for field in overrides]
    size = config.data.get("batch_size", 1)
    plan = ["plan", "--config", args.config, "--topology", "v5e:2x4", "--examples-per-shard", str(size), *fields]
    print(f"Of a slice: subspace-jax {shlex.join(plan)}{_without_libtpu()}")
    print("Nothing was trained, and nothing written to the workdir.")


def _of_which_device(platform: str) -> str:
    """Returns what the estimate of memory is of."""
    what = "for the CPU of this host, whose temporaries differ from those of a TPU or GPU" if platform == "cpu" else ""
    return f"The step was compiled {what or 'for the devices of this machine'}, and not run."


def _without_libtpu() -> str:
    if importlib.util.find_spec("libtpu") is not None:
        return ""
    return " (for TPUs it needs libtpu, which is not installed: pip install libtpu)"


def say(args: argparse.Namespace, text: str) -> None:
    """Shows a phase of the command after the run, such as the export, unless it is to be quiet."""
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def next_command(*words: str) -> None:
    """Prints the command that usually follows."""
    print(f"Next: {shlex.join(words)}")
