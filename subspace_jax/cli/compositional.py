"""The command that measures how compositional features are."""

import argparse

from subspace_jax.cli import shared

_COMPOSITIONAL = """
    subspace-jax compositional --features features.npz --labels labels.csv --out work/compositional   # about a minute
    subspace-jax compositional --features dino.npz clip.npz random.npz --labels labels.npy --out work/compared

    Features hold vectors [examples, d]: .npy, or .npz with features (as `subspace-jax features` writes), vectors or
    embeddings.  labels.csv has the names of the concepts in its first line, and a line for each example:

        shape,colour,size
        square,red,0

    .npy holds integers [examples, concepts]; .npz has them as factors or labels.  A thousand vectors of width 384 with
    three concepts take about a minute on two cores; time grows with examples x width x values x epochs.
    """


def add_commands(commands) -> None:
    """Adds ``compositional``."""
    summary = "measure whether features are sums of one vector per concept value, orthogonal across concepts"
    parser = shared.add_command(commands, "compositional", summary, _compositional, _COMPOSITIONAL)
    parser.add_argument(
        "--features", required=True, nargs="+", metavar="FILE", help="vectors of the examples, by each model"
    )
    parser.add_argument("--labels", required=True, metavar="FILE", help="table of labels, a column for each concept")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for table.json, result.json, geometry.png")
    parser.add_argument(
        "--fraction", type=float, default=0.1, help="share of combinations to fit probes to (default: %(default)s)"
    )
    parser.add_argument("--splits", type=int, default=3, help="random draws of these (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=500, help="of each probe's training (default: %(default)s)")
    parser.add_argument(
        "--method",
        choices=("means", "lstsq"),
        default="means",
        help="means of each value, or least squares, for combinations of unequal numbers (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _compositional(args: argparse.Namespace, overrides: list[str]) -> None:
    import dataclasses
    import json
    import sys
    from pathlib import Path

    import jax

    from subspace_jax import data, train
    from subspace_jax.interpret import compositional_linear as cl

    settings = cl.ReportSettings(args.fraction, args.splits, cl.ProbeSettings(epochs=args.epochs), args.method)
    table = cl.read_label_table(args.labels)
    opened = {path: data.open_vectors("features", path) for path in args.features}
    for path, stored in opened.items():
        if stored.shape[0] != len(table.labels):
            raise ValueError(
                f"--features: {path} has {stored.shape[0]} vectors, and {args.labels} labels of {len(table.labels)} "
                "examples; expected one label for each vector"
            )
    vectors = {path: stored.read() for path, stored in opened.items()}
    out = train.writable_folder(args.out)
    found = []
    for path, x in vectors.items():
        name = Path(path).stem if len({Path(other).stem for other in vectors}) == len(vectors) else path

        def show(text, name=name):
            if not args.quiet:
                print(f"{name}: {text}", file=sys.stderr, flush=True)

        found.append(cl.measure_geometry(jax.random.key(args.seed), x, table, name, settings, show))
    print(cl.geometry_table(found, table))
    described = {"names": table.names, "values": table.values, "settings": dataclasses.asdict(settings)}
    with train.replacing(out / "table.json") as partial:
        rows = [own._asdict() for own in found]
        partial.write_text(json.dumps(described | {"features": rows}, indent=2) + "\n")
    scalars = {}
    for own in found:
        before = f"{own.name}_" if len(found) > 1 else ""
        scalars |= {f"{before}r2_{which}": value for which, value in own.r2.items()}
        scalars |= {f"{before}{which}": own.factor_cosines[which] for which in ("within", "across")}
        scalars |= {f"{before}accuracy": own.accuracy["mean"]}
    shared.write_result(out, scalars)
    cl.plot_geometry(found, table, out / "geometry.png")
    print(f"Wrote table.json, result.json and geometry.png to {out}")
