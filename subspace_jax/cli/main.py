"""The command ``subspace-jax``, thin over the rest."""

import argparse
import contextlib
import importlib.metadata
import logging
import os
import sys
import textwrap
from collections.abc import Sequence

from subspace_jax.cli import language, output, plan, processes, vision

_PACKAGES = ("subspace-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")

_EXAMPLES = {
    "train": """
        subspace-jax train --config configs/gcr/digits.py:k8 --workdir work/digits
        subspace-jax train --config configs/gcr/digits.py:k8 --workdir work/other --config.optim.learning_rate=0.1
        JAX_NUM_CPU_DEVICES=4 subspace-jax train --config configs/gcr/digits.py:k8 --workdir work/sharded \\
            --config.mesh.data=2 --config.mesh.tensor=2

        A run that was stopped goes on from its last checkpoint when it is started again with the same workdir.
        """,
    "eval": """
        subspace-jax eval --workdir work/digits
        subspace-jax eval --workdir work/digits --best
        subspace-jax eval --workdir work/sharded --config.mesh.data=1 --config.mesh.tensor=1   # on one device
        """,
    "intrinsic-dimension": """
        subspace-jax intrinsic-dimension --config configs/optim/intrinsic_digits.py --workdir work/digits_dim
        subspace-jax intrinsic-dimension --config configs/optim/intrinsic_digits.py:dense --workdir work/dense_dim \\
            --config.intrinsic.dims=100,130,160 --config.intrinsic.repeats=3

        A measurement that was stopped goes on when it is started again with the same workdir.
        """,
    "pretrain": """
        subspace-jax pretrain --config configs/lm/tiny.py --workdir work/tiny     # ends with work/tiny/model
        """,
    "finetune": """
        subspace-jax finetune --config configs/lm/tiny.py --model work/tiny/model --workdir work/tuned \\
            --config.data.source=my.jsonl --config.data.evaluation=other.jsonl
        subspace-jax finetune --config configs/lm/tiny.py --model work/tiny/model --workdir work/dora \\
            --config.adapter.method=dora --config.adapter.rank=16     # ends with work/dora/adapter, for PEFT
        """,
    "generate": """
        subspace-jax generate --model work/tiny/model --prompt "Return the" --max-new-tokens 64
        subspace-jax generate --model DIR --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
        subspace-jax generate --model work/tiny/model --adapter work/dora/adapter --prompt "Return the"
        """,
    "perplexity": """
        subspace-jax perplexity --model work/tiny/model --data docstrings
        subspace-jax perplexity --model DIR --data some.jsonl --length 512
        """,
    "accuracy": """
        subspace-jax accuracy --model DIR --data ai2_arc/ARC-Easy --split test
        subspace-jax accuracy --model DIR --data glue/sst2 --by-token
        """,
    "merge": """
        subspace-jax merge --model work/tiny/model --adapter work/dora/adapter --out work/merged
        """,
    "export": """
        subspace-jax export --workdir work/dora --out work/adapter --best
        subspace-jax export --workdir work/dora --out work/merged --merged
        """,
    **vision.EXAMPLES,
    "plan": """
        subspace-jax plan --config configs/lm/large.py:llama3-8b --topology v5e:4x4
        subspace-jax plan --config configs/lm/large.py:llama3-70b --topology v5p:4x4x8 --mesh fsdp=32,tensor=4 \\
            --config.adapter.method=dora --config.adapter.rank=384 --json plan.json
        subspace-jax plan --config configs/lm/large.py:llama3-8b --topology v6e:4x4 --sweep --rows-per-share 1
        """,
    "info": """
        subspace-jax info
        JAX_NUM_CPU_DEVICES=8 subspace-jax info --fsdp 2 --tensor 4
        """,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: Arguments after the program's name; those of the process by default.

    Returns:
      The exit status: 0; 2 for input that can't serve, a full disk, or data or processes that do not come in time; 75
      after SIGTERM, with the state saved; 76 after too many steps that were not finite; 77 where another process was
      lost; 130 after an interrupt from the keyboard; 141 where nobody reads the output any more, such as ``head``,
      which ends no run.
    """
    return output.quietly(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="subspace-jax",
        description="Subspace methods in JAX.",
        epilog=_example_text(*_EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    runs = {
        "train": "train what a config describes",
        "intrinsic-dimension": "measure in how small a random subspace a config's task can be trained",
        "pretrain": "train a language model from nothing, and write it as a Hugging Face folder",
        "finetune": "train a language model from a Hugging Face folder on, whole or by adapters, and write it as one",
    }
    for name, summary in runs.items():
        run = _command(commands, name, summary)
        run.add_argument(
            "--config",
            required=True,
            metavar="FILE[:VARIANT]",
            help="Python file with get_config(), which is run; any of its fields is set by --config.FIELD=VALUE",
        )
        if name == "finetune":
            run.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder to start from")
        run.add_argument("--workdir", required=True, help="folder for checkpoints, metrics and curves")
        run.add_argument("--quiet", action="store_true", help="no progress bar")
        if name != "intrinsic-dimension":
            run.add_argument(
                "--restart",
                action="store_true",
                help="begin at step 0 where the workdir holds a run, which is kept there in a folder earlier.N",
            )
            run.add_argument(
                "--change-seed",
                action="store_true",
                help="go on with another seed than that of the run in the workdir, which is refused otherwise",
            )
        processes.add_arguments(run)
    language.add_commands(commands, _command)
    vision.add_commands(commands, _command)
    plan.add_command(commands, _command)

    evaluate = _command(commands, "eval", "evaluate a checkpoint of a run")
    evaluate.add_argument("--workdir", required=True, help="folder of the run")
    language.add_trust(evaluate)
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    which.add_argument(
        "--best", action="store_true", help="the best checkpoint, by the metric train.best of the config"
    )

    info = _command(commands, "info", "show versions, devices and the mesh")
    for axis, default in (("data", -1), ("fsdp", 1), ("sequence", 1), ("tensor", 1)):
        info.add_argument(f"--{axis}", type=int, default=default, help=f"size of the mesh axis (default: {default})")

    args, extra = parser.parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in extra if text.startswith("--config.")]
    takes_fields = args.command in (*runs, "eval", "plan")
    unknown = [text for text in extra if not (takes_fields and text.startswith("--config."))]
    if unknown:
        hint = " (fields of the config are set by --config.FIELD=VALUE)" if takes_fields else ""
        parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        # With XLA's default scheduler two devices may run a loop's collectives and those outside it in different
        # orders, and wait for each other for ever.
        flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("subspace_jax").setLevel(logging.INFO)
    output.silence_threads()
    try:
        for name in ("workdir", "model", "adapter", "out"):
            if getattr(args, name, None) == "":  # what an unset variable of the shell leaves
                raise ValueError(f"--{name}: expected a folder{' or file' * (name == 'out')}, got an empty path")
        if args.command in (*runs, "plan") and not args.config:
            raise ValueError("--config: expected a Python file, got an empty path")
        if args.command in runs and os.path.normpath(args.workdir) == os.curdir:
            raise ValueError(f"--workdir: expected a folder of the run's own, got {args.workdir!r}, the current one")
        if args.command in runs:
            processes.start(args)
        actions = {
            "train": _train,
            "intrinsic-dimension": _intrinsic_dimension,
            "eval": _evaluate,
            "info": _info,
            **language.ACTIONS,
            **vision.ACTIONS,
            **plan.ACTIONS,
        }
        with output.lasting() if args.command in runs else contextlib.nullcontext():
            actions[args.command](args, overrides)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and args.command not in runs:
            raise
        print(f"subspace-jax {args.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        status, message = processes.ending(error)
        if status is None:
            raise
        print(f"subspace-jax {args.command}: {message}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(
            f"subspace-jax {args.command}: stopped; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_example_text(_EXAMPLES[name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _example_text(*examples: str) -> str:
    return "examples:\n" + "\n".join(textwrap.indent(textwrap.dedent(text).strip(), "  ") for text in examples)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import train

    config = train.override(train.load_config(args.config), overrides)
    _, metrics = train.run(
        config, args.workdir, progress=not args.quiet, restart=args.restart, change_seed=args.change_seed
    )
    print("; ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(f"Wrote checkpoints, metrics.jsonl, tensorboard/ and curves.png to {os.path.abspath(args.workdir)}")


def _intrinsic_dimension(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import metrics, train

    config = train.override(train.load_config(args.config), overrides)
    from subspace_jax.interpret import intrinsic_dimension

    result = intrinsic_dimension.measure_config(config, args.workdir, progress=not args.quiet)
    name = f"d_int{round(100 * result.fraction)}"
    print(f"baseline {result.baseline:.4f} with {result.num_params} parameters")
    if result.dim is None:
        print(f"{name} not reached")
    else:
        print(
            f"{name} {result.dim} with score {result.score:.4f}; compression {result.num_params / result.dim:.1f}, "
            f"{metrics.mdl_bits(result.dim)} bits"
        )
    print(f"Wrote table.jsonl, curve.png and solutions/ to {os.path.abspath(args.workdir)}")


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import train

    step, metrics = train.evaluate_run(
        args.workdir,
        step="best" if args.best else args.step,
        settings=overrides,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"step {step}: " + "; ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def _info(args: argparse.Namespace, overrides: list[str]) -> None:
    import jax

    from subspace_jax import train

    print(f"python {sys.version.split()[0]}")
    for package in _PACKAGES:
        print(f"{package} {importlib.metadata.version(package)}")
    devices = jax.devices()
    print(
        f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} processes"
    )
    mesh = train.make_mesh(args.data, args.fsdp, args.tensor, sequence=args.sequence)
    print("mesh: " + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()))


if __name__ == "__main__":
    sys.exit(main())
