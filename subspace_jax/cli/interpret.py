"""The command that measures an intrinsic dimension."""

import argparse
import os

from subspace_jax.cli import processes, shared

_INTRINSIC_DIMENSION = """
    subspace-jax intrinsic-dimension --config optim/intrinsic_digits --workdir work/digits_dim
    subspace-jax intrinsic-dimension --config optim/intrinsic_digits:dense --workdir work/dense_dim \\
        --config.intrinsic.dims=100,130,160 --config.intrinsic.repeats=3

    A measurement that was stopped resumes when it is started again with the same workdir.
    """


def add_commands(commands) -> None:
    """Adds ``intrinsic-dimension``."""
    summary = "measure the smallest dimension of a random subspace in which a config's task can be trained"
    measure = shared.add_command(
        commands, "intrinsic-dimension", summary, _measure, _INTRINSIC_DIMENSION, fields=True, trains=True
    )
    shared.add_config(measure)
    shared.add_workdir(measure)
    processes.add_arguments(measure)


def _measure(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import metrics, train
    from subspace_jax.interpret import intrinsic_dimension

    config = train.override(train.load_config(args.config), overrides)
    result = intrinsic_dimension.measure_config(config, args.workdir, progress=not args.quiet)
    name = f"d_int{round(100 * result.fraction)}"
    print(f"baseline {result.baseline:.4f} with {result.num_params} parameters")
    found = {"baseline": result.baseline, "num_params": result.num_params}
    if result.dim is None:
        print(f"{name} not reached")
    else:
        found |= {name: result.dim, "score": result.score}
        print(
            f"{name} {result.dim} with score {result.score:.4f}; compression {result.num_params / result.dim:.1f}, "
            f"{metrics.mdl_bits(result.dim)} bits"
        )
    shared.write_result(args.workdir, found)
    print(f"Wrote table.jsonl, result.json, curve.png and solutions/ to {os.path.abspath(args.workdir)}")
