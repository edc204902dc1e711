"""Times what compares two feature spaces, beside the plain way of computing it, in one run.

    python scripts/bench/align.py             # a few minutes on two cores
    python scripts/bench/align.py --quick     # small sizes, to see that all runs

  local_cka   local CKA scores of 8 times 8 queries in 50 directions, by numbers of anchors.  Peer: ``numpy``, one
              CKA of kernels for each pair, as the code of arXiv 2401.05224 does it
  mutual_knn  agreement of the 10 nearest of growing numbers of examples of width 128, float32.  Peers: ``numpy`` (the
              matrix of all cosines, as the code of arXiv 2405.07987 does it) and ``scikit-learn`` (brute-force search)

Values are compared first, and the run ends where they differ.

  ratio  seconds of the peer divided by those of subspace_jax; medians over rounds in which all take turns
  peak   most memory on the host of a process of its own that does this one thing and nothing else, as in ``lm.py``
"""

import argparse
import json
import time
import types
from pathlib import Path

import memory
import numpy as np

QUERIES, DIRECTIONS, WIDTH, K = 8, 50, 128, 10
SIZES = {"local_cka": (200, 800, 1600), "mutual_knn": (1000, 3000, 9000)}
QUICK = {"local_cka": (100,), "mutual_knn": (500,)}


def features(op, size):
    """Two feature matrices that share some directions; for local_cka the last rows are queries."""
    rng = np.random.default_rng(0)
    rows, width = (size + QUERIES, DIRECTIONS) if op == "local_cka" else (size, WIDTH)
    shared = rng.standard_normal((rows, width), np.float32)
    return [shared + rng.standard_normal((rows, width), np.float32) for _ in range(2)]


def ours(op, x, y):
    import jax

    from subspace_jax import metrics
    from subspace_jax.interpret import platos_cave_3d

    if op == "mutual_knn":
        compiled = jax.jit(lambda x, y: metrics.mutual_knn(x, y, k=K))
        arrays = jax.device_put((x, y))
    else:
        compiled = jax.jit(platos_cave_3d.local_cka_scores)
        arrays = jax.device_put((x[:-QUERIES], y[:-QUERIES], x[-QUERIES:], y[-QUERIES:]))
    return lambda: jax.block_until_ready(compiled(*arrays))


def plain(op, x, y):
    return (lambda: _agreement(_by_cosines, x, y)) if op == "mutual_knn" else (lambda: _cka_of_pairs(x, y))


def scikit_learn(op, x, y):
    from sklearn.neighbors import NearestNeighbors

    def search(z):
        # The example itself is found first.
        return NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(z).kneighbors(z)[1][:, 1:]

    return (lambda: _agreement(search, x, y)) if op == "mutual_knn" else None


def _agreement(search, x, y):
    lists = [search(z / np.linalg.norm(z, axis=1, keepdims=True)) for z in (x, y)]
    return np.mean([len(set(a) & set(b)) / K for a, b in zip(*map(np.ndarray.tolist, lists), strict=True)])


def _by_cosines(z):
    cosines = z @ z.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, K, axis=1)[:, :K]


def _cka_of_pairs(x, y):
    def centred(anchors, query):
        z = np.vstack([anchors, query[None]])
        kernel = z @ z.T
        means = kernel.mean(0)
        return kernel - means[None] - means[:, None] + means.mean()

    found = np.empty((QUERIES, QUERIES), np.float32)
    for i in range(QUERIES):
        for j in range(QUERIES):
            k, l = (centred(z[:-QUERIES], z[len(z) - QUERIES + at]) for z, at in ((x, i), (y, j)))
            found[i, j] = np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l))
    return found


SIDES = {"subspace_jax": ours, "numpy": plain, "scikit-learn": scikit_learn}


def compared(op, size, rounds):
    """A row: an operation at one size."""
    import timing

    given = features(op, size)
    calls = {name: call for name, side in SIDES.items() if (call := side(op, *given))}
    values = {name: np.asarray(call()) for name, call in calls.items()}
    error = max(float(np.max(np.abs(value - values["subspace_jax"]))) for value in values.values())
    # A near tie of cosines in float32 may be ranked otherwise.
    if not error <= 1e-4:
        raise SystemExit(f"{op}: the sides differ by {error:.1e}, more than is allowed")
    seconds = timing.in_turns(calls, rounds)
    ratio = {name: t / seconds["subspace_jax"] for name, t in seconds.items()}
    peaks = {name: memory.in_own_process(__file__, name, op, size)["peak"] for name in calls}
    for name, t in seconds.items():
        peak = "-" if peaks[name] is None else f"{peaks[name] / 1e6:.0f} MB"
        print(f"  {op:<10} {size:>6}  {name:<13} {t:>9.4f} s  ratio {ratio[name]:>7.2f}  {peak}", flush=True)
    return {"op": op, "size": size, "error": error, "seconds": seconds, "ratio": ratio, "peak_bytes": peaks}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/align_<device>.json beside this)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:  # imports one of the sides only
        name, op, size = args.worker
        side = types.SimpleNamespace(wait=lambda out: out, device_peak=lambda: None)
        return memory.report(SIDES[name](op, *features(op, int(size))), side)
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    sizes = QUICK if args.quick else SIZES
    rows = [compared(op, size, args.rounds) for op, each in sizes.items() for size in each]
    label = f"align_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
