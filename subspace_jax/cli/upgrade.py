"""The command that changes an embedding model without recomputing the store of vectors."""

import argparse
import logging
from pathlib import Path

from subspace_jax.cli import output, shared

log = logging.getLogger(__name__)

_UPGRADE = """
    subspace-jax upgrade --old old.npz --new new.npz --out work/upgrade        # some thousand items by both models
    subspace-jax upgrade --old old.npy --new new.npy --out work/upgrade --gallery store.npy --queries today.npy
    subspace-jax upgrade --maps work/upgrade --gallery shard2.npy --out work/shard2
    subspace-jax upgrade --maps work/a_to_b work/b_to_c --gallery store_a.npy --check a.npy b.npy c.npy \\
        --out work/a_to_c

    Files hold vectors [items, n] of float16, float32 or float64: .npy, or .npz with features (as `subspace-jax
    features` writes), vectors or embeddings.  Row i of --old and of --new is the same item.

    Two ways to use what is written: the store is mapped forward (--gallery), and queries of the new model search it at
    once; re-embed it then item by item in the order of order.npy, and report.html says how recall rises on the way.  Or
    the store stays as it is, and vectors of the new model, queries and new items, are mapped backward (--queries).

    On one core: about 20 seconds for 1,000 pairs, a minute for 5,000 of widths 256 and 384; of more, 5,000 are drawn
    for the prediction.  Mapping a million vectors of width 384 takes about 20 seconds more.
    """


def add_commands(commands) -> None:
    """Adds ``upgrade``."""
    summary = "change an embedding model: map a store of old vectors to the new model's space, and predict recall"
    parser = shared.add_command(commands, "upgrade", summary, _upgrade, _UPGRADE)
    parser.add_argument("--old", metavar="FILE", help="vectors of a sample of items by the old model")
    parser.add_argument("--new", metavar="FILE", help="vectors of the same items in the same order by the new model")
    parser.add_argument(
        "--labels", metavar="FILE", help="their classes: .npy, or .npz with labels (default: clusters of k-means)"
    )
    parser.add_argument(
        "--maps", nargs="+", metavar="DIR", help="instead of --old and --new: earlier upgrades, the oldest first"
    )
    help_text = "with --maps: vectors of the same items by each model, the oldest first"
    parser.add_argument("--check", nargs="+", metavar="FILE", help=help_text)
    parser.add_argument("--gallery", metavar="FILE", help="stored old vectors to map forward, of any number")
    parser.add_argument("--queries", metavar="FILE", help="new vectors to map backward")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for maps, report and mapped vectors")
    parser.add_argument(
        "--metric", choices=("cosine", "l2"), default="cosine", help="how the store compares vectors (default: cosine)"
    )
    parser.add_argument("--k", type=int, default=10, help="neighbours that recall counts (default: 10)")
    parser.add_argument(
        "--lam", type=float, default=0.5, help="how far the backward map may be from orthogonal (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _upgrade(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import data, train

    _check(args)
    given = (("gallery", args.gallery), ("queries", args.queries))
    streams = {name: data.open_vectors(name, path) for name, path in given if path is not None}
    if not args.maps:
        _check_widths(args, streams)
    out = train.writable_folder(args.out)
    with output.all_or_nothing(out) as folder:
        files = _write(args, folder, streams)
    print("\n".join([f"Wrote to {out}:", *(f"  {file}" for file in files), "  report.html: all of this as a page"]))
    if not streams:
        print("No vectors were mapped: --maps with this folder and --gallery or --queries maps some.")


def _write(args: argparse.Namespace, folder: Path, streams: dict) -> list[str]:
    """Computes and writes all files; returns a line for each but the report."""
    from subspace_jax.represent import lambda_orthogonality as upgrades
    from subspace_jax.represent.lambda_orthogonality import report

    items = streams["gallery"].shape[0] if args.gallery else None
    chain, record, tables, files = (_chained if args.maps else _fitted)(args, folder, items)
    upgrades.save_maps(folder, chain, record)
    files = ["maps.safetensors: the maps, float32", "upgrade.json: what they are, and all figures", *files]
    print("\n\n".join(table.text() for table in tables), end="\n\n" if tables else "", flush=True)
    for name, source in streams.items():
        direction = "forward" if name == "gallery" else "backward"
        written = upgrades.map_store(chain, source, folder, direction=direction, progress=not args.quiet)
        files += [f"{path.name}: {_PURPOSES[path.name]}" for path in written]
    report.write_report(folder, chain, tables, files)
    return files


_PURPOSES = {
    "gallery.npy": "the stored vectors in the new space, in their order",
    "order.npy": "numbers of the stored vectors in the order in which to re-embed them",
    "queries.npy": "the new vectors in the old space, in their order",
}


def _check_widths(args: argparse.Namespace, streams: dict) -> None:
    """Raises before the fit what the mapping of a file of another width would raise after it."""
    from subspace_jax import data

    for name, of in (("gallery", "old"), ("queries", "new")):
        width = data.open_vectors(of, getattr(args, of)).shape[1]
        if name in streams and streams[name].shape[1] != width:
            raise ValueError(
                f"--{name}: expected vectors of the width {width} of --{of}, got width {streams[name].shape[1]}"
            )


def _check(args: argparse.Namespace) -> None:
    out = Path(args.out).expanduser().resolve()
    if any(Path(folder).expanduser().resolve() == out for folder in args.maps or ()):
        raise ValueError(
            f"--out: expected another folder than those of --maps, whose files it would replace, got {out}"
        )
    read = [args.old, args.new, args.labels, args.gallery, args.queries, *(args.check or ())]
    written = {out / name for name in _PURPOSES}
    if own := [path for path in read if path and Path(path).expanduser().resolve() in written]:
        raise ValueError(f"--out: expected a folder in which no file is replaced that is read, got that of {own[0]}")
    if args.maps and (args.old or args.new or args.labels):
        raise ValueError("--maps: joins earlier upgrades, and takes no --old, --new or --labels; --check measures it")
    if not args.maps and not (args.old and args.new):
        raise ValueError("--old, --new: expected both, the vectors of the same items by both models; or --maps")
    if args.maps and len(args.maps) == 1 and not (args.gallery or args.queries or args.check):
        raise ValueError("--maps: of one upgrade there is nothing to do without --gallery, --queries or --check")
    if args.check and not args.maps:
        raise ValueError("--check: is for --maps")
    if args.check and len(args.check) != len(args.maps) + 1:
        raise ValueError(
            f"--check: expected {len(args.maps) + 1} files for {len(args.maps)} upgrades, a file for each model; got "
            f"{len(args.check)}"
        )


def _fitted(args: argparse.Namespace, out: Path, items: int | None):
    """Fits the maps to pairs; returns chain, record, tables and a line for each file."""
    import dataclasses

    from subspace_jax import data
    from subspace_jax.represent import lambda_orthogonality as upgrades
    from subspace_jax.represent.lambda_orthogonality import report

    old, new = (data.open_vectors(name, path).read() for name, path in (("old", args.old), ("new", args.new)))
    for name, path, h in (("old", args.old, old), ("new", args.new, new)):
        data.check_informative(f"{name}: {path}", h, args.metric)
    labels = None if args.labels is None else data.read_labels(args.labels, len(old))
    settings = upgrades.UpgradeSettings(args.metric, args.k, args.lam, args.seed)
    chain, found = upgrades.fit_upgrade(old, new, labels, settings)
    if found.at_chance:
        log.warning(report.AT_CHANCE, args.old, args.new)
    report.write_curve(found, out)
    record = {"pairs": len(old), "settings": dataclasses.asdict(settings), "prediction": found._asdict()}
    tables = [report.summary_table(found, items), report.curve_table(found)]
    return chain, record, tables, ["curve.png, curve.csv: recall over the share of re-embedded items"]


def _chained(args: argparse.Namespace, out: Path, items: int | None):
    """Reads and joins the maps of earlier upgrades; returns the same."""
    from subspace_jax import data
    from subspace_jax.represent import lambda_orthogonality as upgrades
    from subspace_jax.represent.lambda_orthogonality import report

    chains, records = zip(*(upgrades.load_maps(folder) for folder in args.maps), strict=True)
    chain, record, tables = upgrades.joined(chains, args.maps), {"links": args.maps}, []
    if len(chains) > 1 and all("prediction" in other for other in records):
        tables.append(report.links_table(records, args.maps))
    if args.check:
        spaces = [data.open_vectors("check", path).read() for path in args.check]
        record["check"] = upgrades.check_chain(chains, spaces, args.k)
        tables.append(report.chain_table(record["check"], args.maps, args.k))
    return chain, record, tables, []
