"""Clustering of the nodes of an attributed graph, for the command ``cluster``."""

import argparse

METHODS = ("s2cag", "m-s2cag")
HELP = """
    For `s2cag` and `m-s2cag` the input is a graph with attributes of its nodes: .npz with edge_src, edge_dst and
    features or feat_*; .npz with adj_* and attr_*; or, with --attributes, what scipy.sparse.save_npz writes, or .csv
    with lines node,node or node,node,weight.  One seed of 3,000 nodes takes some seconds, and as many to compile.
    """
_ALONE = ("attributes", "rounding", "vectors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only graphs have."""
    both = "s2cag, m-s2cag"
    parser.add_argument("--attributes", metavar="FILE", help=f"{both}: attributes of the nodes, .npy, or .npz of SciPy")
    parser.add_argument("--steps", type=int, help=f"{both}: how far attributes travel over edges (default: 10)")
    parser.add_argument("--alpha", type=float, help=f"{both}: weight of a step to that before (default: 0.9)")
    parser.add_argument("--iterations", type=int, help=f"{both}: power iterations (default: 7, 50)")
    parser.add_argument("--rounding", help=f"{both}: snem-cpqr, snem or kmeans (default: snem-cpqr)")
    parser.add_argument("--vectors", action="store_true", help=f"{both}: attributes are no counts: no tf-idf")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises for an argument of graphs with another method, and the other way round."""
    graph = args.method in METHODS
    for name in () if graph else _ALONE:
        if getattr(args, name):
            raise ValueError(f"--{name}: is for {' and '.join(METHODS)}, not for {args.method}")
    if graph and (args.input is None or args.input.startswith("tfds:") or args.backbone is not None):
        raise ValueError(f"--input: expected a file with a graph, for {args.method} clusters its nodes")
    if graph and args.split is not None:
        raise ValueError(f"--split: is for --input tfds:NAME, not for {args.method}")
    if graph and args.raw:
        raise ValueError(f"--raw: is not for {args.method}; --vectors takes attributes without tf-idf weights")


def cluster(args: argparse.Namespace, options: dict, seeds: range):
    """Returns the clusters, and a function that draws them into a file."""
    from subspace_jax import data, train
    from subspace_jax.cluster.s2cag import core, run

    options = {name: int(value) if name in ("T", "tau") else value for name, value in options.items()}
    options |= {"rounding": args.rounding} if args.rounding else {}
    options |= {"counts": False} if args.vectors else {}
    core.check_options(core.Options(**options))
    graph = data.read_graph(args.input, args.attributes)
    n, d = graph.attributes.shape
    where = f"input: {args.input}" if args.attributes is None else f"attributes: {args.attributes}"
    if min(n, d) < 2:
        raise ValueError(f"{where}: expected two nodes and two attributes or more, got {[n, d]}")
    if not args.vectors and graph.attributes.min() < 0:
        raise ValueError(
            f"{where}: expected counts, got {graph.attributes.min():.3g}; --vectors takes what is no count"
        )
    most = n if args.method == "m-s2cag" else min(n, d) - 1
    if args.k is not None and not 1 <= args.k <= most:
        raise ValueError(f"--k: expected 1 to {most} for {n} nodes with {d} attributes in {args.input}, got {args.k}")
    labels = None if args.labels is None else data.read_labels(args.labels, n)
    if graph.symmetrized:
        print(f"{args.input}: is not symmetric; each pair of nodes gets the larger of both weights", flush=True)
    alone = int(((graph.adjacency.sum(axis=1) == 0) & (abs(graph.attributes).sum(axis=1) == 0)).sum())
    if alone:
        print(
            f"{alone} node{'s' * (alone > 1)} with neither edges nor attributes: their cluster tells nothing",
            flush=True,
        )
    train.writable_folder(args.out)
    edges = (graph.adjacency.nnz + (graph.adjacency.diagonal() != 0).sum()) // 2
    counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    print(f"Clustering {n} nodes with {edges} edges and {d} attributes by {args.method}, {counted}", flush=True)
    try:
        found = run.cluster_graph(graph, args.k, args.method, seeds=seeds, labels=labels, progress=True, **options)
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        raise ValueError(f"{where}: {rest}" if name in ("X", "f", "counts") else str(error)) from error
    return found, lambda file: run.write_picture(found, graph, file)
