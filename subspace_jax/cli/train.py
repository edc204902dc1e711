"""The commands that train what a config describes, and evaluate its checkpoints."""

import argparse
import os

from subspace_jax.cli import runs, shared

_TRAIN = """
    subspace-jax train --config gcr/digits:k8 --workdir work/digits
    subspace-jax train --config gcr/digits:k8 --workdir work/other --config.optim.learning_rate=0.1
    subspace-jax train --config gcr/digits:k8 --dry-run     # the run and its memory; trains nothing
    JAX_NUM_CPU_DEVICES=4 subspace-jax train --config gcr/digits:k8 --workdir work/sharded \\
        --config.mesh.data=2 --config.mesh.tensor=2

    A run that was stopped resumes from its last checkpoint when it is started again with the same workdir.
    """
_EVAL = """
    subspace-jax eval --workdir work/digits
    subspace-jax eval --workdir work/digits --best
    subspace-jax eval --workdir work/sharded --config.mesh.data=1 --config.mesh.tensor=1   # on one device
    """


def add_commands(commands) -> None:
    """Adds ``train`` and ``eval``."""
    train = shared.add_command(
        commands, "train", "train what a config describes", _train, _TRAIN, fields=True, trains=True
    )
    runs.add_arguments(train)

    evaluate = shared.add_command(commands, "eval", "evaluate a checkpoint of a run", _evaluate, _EVAL, fields=True)
    evaluate.add_argument("--workdir", required=True, help="folder of the run")
    shared.add_trust(evaluate)
    shared.add_checkpoint(evaluate)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import train

    config = train.override(train.load_config(args.config), runs.settings(args, overrides))
    if runs.shown_only(args, overrides, config):
        return
    result = train.run(
        config, args.workdir, progress=not args.quiet, restart=args.restart, change_seed=args.change_seed
    )
    metrics = {**result.metrics, **result.summary}
    shared.write_result(args.workdir, metrics)
    print("; ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    print(
        f"Wrote checkpoints, metrics.jsonl, result.json, tensorboard/ and curves.png to {os.path.abspath(args.workdir)}"
    )
    runs.next_command("subspace-jax", "eval", "--workdir", args.workdir, "--best")


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import train

    step, metrics = train.evaluate_run(
        args.workdir,
        step="best" if args.best else args.step,
        settings=overrides,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"step {step}: " + "; ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
