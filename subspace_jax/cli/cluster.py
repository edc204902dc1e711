"""The command that clusters features or images by subspaces."""

import argparse
import json

from subspace_jax.cli import cluster_graph, cluster_input, shared

_CLUSTER = """
    subspace-jax cluster --input features.npy --k 10 --method tsc --out work/clusters  # seconds for some thousand
    subspace-jax cluster --input features.npz --labels features.npz --k 10 --seeds 5 --out work/clusters
    subspace-jax cluster --input features.npy --method lsr --out work/clusters         # k by the eigengap
    subspace-jax cluster --images photos --backbone dinov2-small --k 5 --out work/photos
    subspace-jax cluster --input tfds:digits --k 10 --out work/digits                  # offline
    subspace-jax cluster --input images.npy --method dsc --k 10 --keep 12 --seeds 1 --out work/clusters   # minutes
    subspace-jax cluster --method s2cag --input graph.npz --k 3 --steps 15 --alpha 0.8 --out work/s2cag      # a minute
    subspace-jax cluster --method m-s2cag --input edges.csv --attributes counts.npy --k 6 --out work/s2cag

    The file holds features [items, n] of float16, float32 or float64: .npy, or .npz with features, vectors or
    embeddings.  Images are compared by a model's features, or by their pixels, which serves for images of one kind and
    pose alone.  Each item is divided by its length first.  With true labels (--labels, folders of images, or a set of
    TFDS) the scores of all seeds are told, with their spread.  One seed of `spectral` on 20,000 items of width 64 takes
    10 s of processor time, half of it compiling; dinov2-small takes 0.1 s an image.

    Without --k the number of clusters is that before the widest gap of the graph's eigenvalues, at most 30 and, but for
    `s2cag` and `m-s2cag`, the root of the number of items.

    For `dsc` the file holds images [items, height, width] or [items, height, width, channels] with even sides: .npy, or
    .npz with images.  One seed of 400 images of 8 x 8 takes half a minute of processor time.
    """
_CLUSTER += cluster_graph.HELP
_GRAPHS = cluster_graph.METHODS
_OPTIONS = {
    "neighbors": ("n_neighbors", ("tsc", "spectral")),
    "dim": ("n_components", ("k-subspaces",)),
    "gamma": ("gamma", ("lsr", "lrr-l21", "ssc", "m-s2cag")),
    "tau": ("tau", ("ssc",)),
    "noise": ("noise", ("lrr",)),
    "nonzeros": ("n_nonzeros", ("ssc-omp",)),
    "keep": ("keep", ("dsc",)),
    "steps": ("T", _GRAPHS),
    "alpha": ("alpha", _GRAPHS),
    "iterations": ("tau", _GRAPHS),
}


def add_commands(commands) -> None:
    """Adds ``cluster``."""
    summary = "cluster features by subspaces: k-subspaces, self-expression, thresholding, spectral clustering, k-means"
    parser = shared.add_command(commands, "cluster", summary, _cluster, _CLUSTER)
    cluster_input.add_input(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for labels, report and picture")
    parser.add_argument("--k", type=int, help="number of clusters (default: by the eigengap of the graph)")
    features = ("kmeans", "k-subspaces", "spectral", "tsc", "lsr", "lrr", "lrr-l21", "ssc", "ssc-omp")
    methods = (*features, "dsc", *_GRAPHS)
    parser.add_argument("--method", choices=methods, default="tsc", help="default: tsc")
    parser.add_argument("--labels", metavar="FILE", help="true labels, .npy or .npz with labels: only for scores")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs, seeds --seed and on (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run (default: 0)")
    parser.add_argument("--neighbors", type=int, help="tsc, spectral: neighbours of an item (default: 4, 10)")
    parser.add_argument("--dim", type=int, help="k-subspaces: dimension of a subspace (default: 1)")
    parser.add_argument(
        "--gamma",
        type=float,
        help="lsr, ssc, lrr-l21: weight of the data or errors (10, 50, 4); m-s2cag: resolution (1)",
    )
    parser.add_argument("--tau", type=float, help="ssc: share of the 1-norm; 1 is the lasso (default: 0.9)")
    parser.add_argument("--noise", type=float, help="lrr: weight of the nuclear norm (default: 0)")
    parser.add_argument("--nonzeros", type=int, help="ssc-omp: coefficients of an item, at most (default: 10)")
    parser.add_argument("--keep", type=int, help="dsc: coefficients of an item that count (default: 9)")
    parser.add_argument("--raw", action="store_true", help="do not divide features by their lengths")
    cluster_graph.add_arguments(parser)


def _cluster(args: argparse.Namespace, overrides: list[str]) -> None:
    import numpy as np

    from subspace_jax import data, linalg, train
    from subspace_jax.cli import cluster_images
    from subspace_jax.cluster.classical import run

    options = _options(args)
    if args.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {args.seeds}")
    if not 0 <= args.seed <= 2**32 - args.seeds:
        raise ValueError(f"--seed: expected 0 to {2**32 - args.seeds}, got {args.seed}")
    if args.k is None and args.method in ("kmeans", "k-subspaces"):
        raise ValueError(f"--k: expected a number of clusters, for {args.method} has no graph that tells one")
    cluster_graph.check_arguments(args)
    seeds = range(args.seed, args.seed + args.seeds)
    if args.method in _GRAPHS:
        return _write(args, *cluster_graph.cluster(args, options, seeds), options)
    deep = args.method == "dsc"
    items = cluster_images.open_images(args) if deep else cluster_input.open_items(args)
    n, width = items.count, items.width
    if n < 2 or (args.k is not None and not 1 <= args.k <= n):
        raise ValueError(f"--k: expected 1 to {n}, the number of items in {args.input or args.images}, got {args.k}")
    if args.dim is not None and width is not None and args.dim > width:
        raise ValueError(f"--dim: expected 1 to {width}, the width of {args.input}, got {args.dim}")
    labels = None if args.labels is None else data.read_labels(args.labels, n)
    train.writable_folder(args.out)
    read = items.read()
    x, labels = read.x, read.labels if labels is None else labels
    if not args.raw:
        x = np.asarray(linalg.unit_vectors(x))
    print(
        f"Clustering {n} items of width {x.shape[1]} by {args.method}, {args.seeds} seed{'s' * (args.seeds > 1)}",
        flush=True,
    )
    if deep:
        found = cluster_images.cluster(read.images, args.k, seeds, labels, **options)
    else:
        found = run.cluster_features(x, args.k, args.method, seeds=seeds, labels=labels, progress=True, **options)
    return _write(args, found, lambda file: run.write_picture(found, x, file), options, read)


def _write(args: argparse.Namespace, found, draw, options: dict[str, float], read=None) -> None:
    """Writes clusters; ``draw`` draws them into a file, ``read`` has names or images of items."""
    import numpy as np

    from subspace_jax import train
    from subspace_jax.cluster.classical import run

    out = train.writable_folder(args.out)
    names, image = (read.names, read.image) if read else ((), None)
    report = _report(args, found, options)
    with train.replacing(out / "labels.npy") as partial, partial.open("wb") as file:
        np.save(file, found.labels)
    with train.replacing(out / "clusters.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
    with train.replacing(out / "clusters.png") as partial, partial.open("wb") as file:
        draw(file)
    for name in ("labels.csv", "images.png"):  # of an earlier run
        (out / name).unlink(missing_ok=True)
    if names:
        with train.replacing(out / "labels.csv") as partial:
            run.write_names(found, names, partial)
    if image is not None:
        with train.replacing(out / "images.png") as partial, partial.open("wb") as file:
            run.write_images(found, image, file)
    shared.write_result(out, {"k": found.k, **{name: mean for name, (mean, _) in report.get("scores", {}).items()}})
    print(_table(report))
    item, blocks = ("node", "edges") if args.method in _GRAPHS else ("item", "affinity")
    drawn = args.method in _GRAPHS or found.affinity is not None
    print(
        f"Wrote to {args.out}:\n"
        f"  labels.npy: the cluster of each {item}, of the first seed\n"
        "  clusters.json: sizes, agreement of the seeds and scores\n"
        f"  clusters.png: {item}s by cluster{f', and the {blocks} in blocks' * drawn}"
        + "\n  labels.csv: the same by name" * bool(names)
        + "\n  images.png: some images of each cluster" * (image is not None)
    )


def _options(args: argparse.Namespace) -> dict[str, float]:
    """Returns the options of the method's estimator; raises for one of another method."""
    given = {}
    for flag, (name, methods) in _OPTIONS.items():
        value = getattr(args, flag)
        if value is not None and args.method not in methods:
            raise ValueError(f"--{flag}: is for {' and '.join(methods)}, not for {args.method}")
        if value is not None and (not value >= 0 or (isinstance(value, int) and value < 1)):
            raise ValueError(f"--{flag}: expected {'1' if isinstance(value, int) else '0'} or more, got {value}")
        if value is not None:
            given[name] = value
    return given


def _report(args: argparse.Namespace, found, options: dict[str, float]) -> dict:
    """What ``clusters.json`` holds; scores as mean and standard deviation over the seeds."""
    import numpy as np

    report = {
        "input": args.input or args.images,
        "backbone": args.backbone,
        "method": args.method,
        "options": options,
        "k": found.k,
    }
    report |= {"chosen": args.k is None, "sizes": np.bincount(found.labels, minlength=found.k).tolist()}
    report |= {"seeds": args.seeds, "agreement": list(found.agreement)}
    if found.scores:
        values = np.asarray(found.scores)
        spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        rows = zip(found.scores[0]._fields, values.mean(0), spread, strict=True)
        report["scores"] = {name: [float(mean), float(std)] for name, mean, std in rows}
    cuts = getattr(found, "cuts", {})
    return report | ({"cuts": cuts, "path": found.path} if cuts else {})


def _table(report: dict) -> str:
    sizes = sorted(report["sizes"])
    chosen = ", chosen by the eigengap" if report["chosen"] else ""
    if report["k"] == 1:
        lines = [f"1 cluster{chosen}, of all {sizes[0]} items" + "; --k asks for more" * bool(chosen)]
    else:
        lines = [f"{report['k']} clusters{chosen}, of {sizes[0]} to {sizes[-1]} items"]
    if report["agreement"]:
        lines.append(f"agreement of the seeds (adjusted Rand index): at least {min(report['agreement']):.3f}")
    for name, (mean, std) in report.get("scores", {}).items():
        lines.append(f"  {name:<9} {mean:.4f} ± {std:.4f}")
    for name, each in report.get("cuts", {}).items():
        lines.append(f"  {name} of the graph {sum(each) / len(each):.4f}")
    return "\n".join(lines)
