"""Times clustering beside scikit-learn, in one run.

    python scripts/bench/clustering.py             # some ten minutes on two cores
    python scripts/bench/clustering.py --quick     # small sizes, to see that all runs

  kmeans    20 starts of k-means++ with 10 clusters, float32 of width 64
  spectral  normalized spectral clustering of the graph of 10 nearest neighbours, 20 starts of k-means on its embedding
  k-subspaces  10 affine subspaces of dimension 6, one start, to the end; beside it scikit-learn's k-means, one start,
            which scikit-learn has in its place: the ratio says how much more it costs

Points lie near 10 subspaces of dimension 6 that do not contain the origin.  Accuracies are told, for a faster side
must not be a worse one.

  ratio  seconds of scikit-learn divided by those of subspace_jax; medians over rounds in which both take turns
  peak   most memory on the host of a process of its own that does this one thing and nothing else, as in ``lm.py``
"""

import argparse
import json
import math
import time
import types
from pathlib import Path

import memory
import numpy as np

K, WIDTH, DIM, NEIGHBORS, STARTS = 10, 64, 6, 10, 20
SIZES = {
    "kmeans": (2000, 20000, 100000),
    "spectral": (2000, 6000, 20000),
    "k-subspaces": (10000, 100000, 1000000),
}
LARGE = 500000  # points, from which on one call has to do after one to compile
QUICK = {"kmeans": (500,), "spectral": (500,), "k-subspaces": (500,)}


def points(n):
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.standard_normal((K, WIDTH, DIM)))[0]
    labels = rng.integers(K, size=n)
    x = np.einsum("nd,nwd->nw", rng.standard_normal((n, DIM)), bases[labels])
    x += rng.standard_normal((K, WIDTH))[labels] * 0.3 + 0.1 * rng.standard_normal((n, WIDTH))
    return x.astype(np.float32), labels


def ours(op, x):
    import jax

    from subspace_jax import linalg
    from subspace_jax.cluster import classical

    @jax.jit
    def call(x):
        key = jax.random.key(0)
        if op == "kmeans":
            return linalg.kmeans(key, x, K, restarts=STARTS).assignments
        if op == "k-subspaces":
            return linalg.k_subspaces(key, x, K, DIM, restarts=1, affine=True).assignments
        return linalg.spectral_clustering(
            key, classical.neighbor_affinity(x, NEIGHBORS), K, restarts=STARTS
        ).assignments

    x = jax.device_put(x)
    return lambda: jax.block_until_ready(call(x))


def scikit_learn(op, x):
    from sklearn import cluster

    if op != "spectral":
        starts = STARTS if op == "kmeans" else 1
        return lambda: cluster.KMeans(K, n_init=starts, random_state=0, max_iter=100).fit_predict(x)
    return lambda: cluster.SpectralClustering(
        K, affinity="nearest_neighbors", n_neighbors=NEIGHBORS, n_init=STARTS, random_state=0
    ).fit_predict(x)


SIDES = {"subspace_jax": ours, "scikit-learn": scikit_learn}


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compared(op, size, rounds):
    """A row: an operation at one size."""
    import timing

    from subspace_jax import metrics

    x, labels = points(size)
    calls = {name: side(op, x) for name, side in SIDES.items()}
    scores = {name: metrics.cluster_scores(labels, np.asarray(call()))[:3] for name, call in calls.items()}
    once = size >= LARGE
    seconds = {n: seconds_of(c) for n, c in calls.items()} if once else timing.in_turns(calls, rounds, least_seconds=0)
    ratio = {name: t / seconds["subspace_jax"] for name, t in seconds.items()}
    peaks = {name: memory.in_own_process(__file__, name, op, size)["peak"] for name in calls}
    for name, t in seconds.items():
        peak = "-" if peaks[name] is None else f"{peaks[name] / 1e6:.0f} MB"
        accuracy, nmi, ari = scores[name]
        told = f"accuracy {accuracy:.3f}  NMI {nmi:.3f}  ARI {ari:.3f}"
        print(f"  {op:<11} {size:>7}  {name:<13} {t:>8.3f} s  ratio {ratio[name]:>6.2f}  {peak:>8}  {told}", flush=True)
    return {"op": op, "size": size, "seconds": seconds, "ratio": ratio, "peak_bytes": peaks, "scores": scores}


def slopes(rows):
    """Exponents of the growth of time with the number of points, between the first and the last size."""
    found = {}
    for op in {row["op"]: None for row in rows}:
        first, *_, last = [row for row in rows if row["op"] == op] * 2
        if first["size"] < last["size"]:
            growth = math.log(last["size"] / first["size"])
            found[op] = {name: math.log(last["seconds"][name] / first["seconds"][name]) / growth for name in SIDES}
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=tuple(SIZES), help="one operation")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/clustering_<device>.json beside this)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:  # imports one of the sides only
        name, op, size = args.worker
        side = types.SimpleNamespace(wait=lambda out: out, device_peak=lambda: None)
        return memory.report(SIDES[name](op, points(int(size))[0]), side, 1 if int(size) >= LARGE else 2)
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    sizes = QUICK if args.quick else SIZES
    rows = [compared(op, size, args.rounds) for op, each in sizes.items() if args.only in (None, op) for size in each]
    label = f"clustering_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds}
    report |= {"rows": rows, "slopes": slopes(rows)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
