"""The commands that train over a stream of tasks, and compare such runs."""

import argparse
import os

from subspace_jax.cli import runs, shared

_CONTINUAL = """
    subspace-jax continual --config continual/permuted_digits --workdir work/digits          # CoSO
    subspace-jax continual --config continual/permuted_digits:gpm --workdir work/digits_gpm
    subspace-jax continual --config continual/split_mnist:replay --workdir work/split \\
        --config.model.buffer=500
    subspace-jax continual --config continual/permuted_digits --workdir work/guarded \\
        --config.model.certificate.guard=scale --config.model.certificate.limit=0.1

    Writes what train does, and accuracy.npz and accuracy.png: accuracies on every task after each one.  A minute for
    permuted digits on two CPU cores.  A run that was stopped, inside a task too, resumes when it is started again
    with the same workdir; with other tasks it is refused.
    """
_SCORES = """
    subspace-jax continual-scores work/digits work/digits_gpm work/digits_seed1

    A line for each method: means and standard deviations over its seeds.  Runs of one method differ in their seeds
    alone.  Final accuracy is of all tasks after the last one, average accuracy of the tasks so far after each;
    forgetting is what a task lost since its best, backward transfer what it gained since its own end.
    """


def add_commands(commands) -> None:
    """Adds ``continual`` and ``continual-scores``."""
    parser = shared.add_command(
        commands,
        "continual",
        "train tasks one after another, and measure what is forgotten",
        _continual,
        _CONTINUAL,
        fields=True,
        trains=True,
    )
    runs.add_arguments(parser)
    scores = shared.add_command(
        commands, "continual-scores", "compare methods by their runs over one stream", _scores, _SCORES
    )
    scores.add_argument("runs", nargs="+", metavar="DIR", help="folders of runs of `subspace-jax continual`")


def _continual(args: argparse.Namespace, overrides: list[str]) -> None:
    from pathlib import Path

    import jax

    from subspace_jax import train
    from subspace_jax.continual import report
    from subspace_jax.continual.stream import accuracy_matrix

    config = train.override(train.load_config(args.config), runs.settings(args, overrides))
    if config.task != "subspace_jax.continual.task":
        raise ValueError(f"--config: expected a config of a stream, got {args.config}")
    if runs.shown_only(args, overrides, config):
        return
    result = train.run(
        config, args.workdir, progress=not args.quiet, restart=args.restart, change_seed=args.change_seed
    )
    shared.write_result(args.workdir, {**result.metrics, **result.summary})
    files = []
    if jax.process_index() == 0:
        title = f"{config.model.method}: {config.data.kind} {config.data.name}"
        files = report.write_report(result.rows, Path(args.workdir).expanduser(), title)
    print(report.matrix_text(accuracy_matrix(result.rows, report.num_tasks_in(result.rows))))
    print("; ".join(f"{name} {value:.4f}" for name, value in result.summary.items()))
    names = ", ".join(["checkpoints, metrics.jsonl, result.json", *(path.name for path in files)])
    print(f"Wrote {names} and curves.png to {os.path.abspath(args.workdir)}")


def _scores(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.continual import report

    print(report.comparison_text(report.compare_runs(args.runs)))
