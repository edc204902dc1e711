"""Times S2CAG on random attributed graphs beside the same equations in NumPy and SciPy, in one run.

    python scripts/bench/graphs.py             # some twenty minutes on two cores, up to 10^7 edges
    python scripts/bench/graphs.py --quick     # small sizes, to see that all runs

Edges join nodes of one of 8 classes four times out of five, attributes are 32 counts that depend on the class.
Each side runs in a process of its own; sides take turns.  Both form the smoothed attributes (T = 10), take 7 power
iterations and round by SNEM from the largest entries, in float32.

  prepare    seconds from the adjacency to the propagation matrix in the form that is multiplied
  fit        seconds from attributes to labels, of the second call: the first one compiles
  processor  processor seconds of the same, all threads: what to look at where a machine is busy
  peak       most memory of the process, the graph itself included
  slope      exponent of the growth of processor seconds of ``fit`` with the number of edges, first to last size
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

K, D, T, ALPHA, TAU = 8, 32, 10, 0.9, 7
SIZES = ((10**5, 10**6), (10**5, 10**7), (10**6, 10**7))
QUICK = ((2000, 10**4), (5000, 5 * 10**4))


def random_graph(n, edges, seed=0):
    """A symmetric adjacency with classes ``node % 8``, counts of attributes and labels."""
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    source = rng.integers(n, size=edges, dtype=np.int32)
    target = rng.integers(n // K, size=edges, dtype=np.int32) * K
    same = rng.random(edges, np.float32) < 0.8
    target += np.where(same, source % K, rng.integers(K, size=edges, dtype=np.int32)).astype(np.int32)
    target = np.minimum(target, n - 1)
    one_way = sp.coo_array((np.ones(edges, np.float32), (source, target)), shape=(n, n)).tocsr()
    one_way.data[:] = 1
    labels = np.arange(n) % K
    rates = np.where(np.arange(D) % K == np.arange(K)[:, None], 1.2, 0.4).astype(np.float32)
    counts = np.concatenate([rng.poisson(rates[block]) for block in np.array_split(labels, max(1, n // 10**5))])
    return one_way.maximum(one_way.T).tocsr(), counts.astype(np.float32), labels


def ours(adjacency, counts):
    import jax

    from subspace_jax.cluster import s2cag

    p = s2cag.normalize_adjacency(adjacency)
    jax.block_until_ready(p)
    options = {"T": T, "alpha": ALPHA, "tau": TAU, "rounding": "snem", "path": "explicit"}
    return lambda: np.asarray(s2cag.s2cag(jax.random.key(0), p, counts, K, **options).labels)


def scipy_reference(adjacency, counts):
    import scipy.sparse as sp

    n = adjacency.shape[0]
    eye = sp.eye_array(n, dtype=np.float32, format="csr")
    w = (adjacency + eye).tocsr()
    root = 1 / np.sqrt(w.sum(1))
    w = (sp.diags_array(root) @ w @ sp.diags_array(root) + eye).tocsr()
    p = (sp.diags_array(1 / w.sum(1)) @ w).tocsr().astype(np.float32)

    def fit():
        f = counts * (np.log((1 + n) / (1 + (counts > 0).sum(0))) + 1).astype(np.float32)
        f /= np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12)
        sums = f @ f.sum(0)
        x = f / np.sqrt(np.where(sums == 0, 1, sums))[:, None]
        z, total = x, 1.0
        for _ in range(T):
            total = 1 + ALPHA * total
            z = np.float32(1 - 1 / total) * (p @ z) + np.float32(1 / total) * x
        g = np.random.default_rng(0).standard_normal((D, K + 10)).astype(np.float32)
        for _ in range(TAU):
            g = np.linalg.qr(z.T @ (z @ g))[0]
        q = np.linalg.qr(z @ g)[0]
        y = (q @ np.linalg.svd(q.T @ z, full_matrices=False)[0])[:, 1 : K + 1]
        y = y * np.sign(np.take_along_axis(y, np.abs(y).argmax(0)[None], 0))
        labels = y.argmax(1)
        for _ in range(100):
            members = np.eye(K, dtype=np.float32)[labels]
            now = (y @ (y.T @ members / np.sqrt(np.maximum(members.sum(0), 1)))).argmax(1)
            if (now == labels).all():
                break
            labels = now
        return labels

    return fit


SIDES = {"subspace_jax": ours, "SciPy": scipy_reference}


def worker(name, n, edges):
    """Prints what one side takes."""
    import memory

    adjacency, counts, labels = random_graph(n, edges)
    start = time.perf_counter(), time.process_time()
    fit = SIDES[name](adjacency, counts)
    prepare = time.perf_counter() - start[0], time.process_time() - start[1]
    fit()
    start = time.perf_counter(), time.process_time()
    found = fit()
    took = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = memory.resident_peak()
    from subspace_jax import metrics

    scores = metrics.cluster_scores(labels, found.astype(int))[:3]
    told = {"prepare": prepare, "fit": took, "peak": peak, "scores": scores, "edges": (adjacency.nnz) // 2}
    print(json.dumps(told))


def measured(name, n, edges):
    command = [sys.executable, __file__, "--worker", name, str(n), str(edges)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {n} nodes: failed\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1]) | {"side": name, "nodes": n}
    (_, prepare), (wall, fit), (accuracy, nmi, ari) = row["prepare"], row["fit"], row["scores"]
    peak = "-" if row["peak"] is None else f"{row['peak'] / 1e9:.2f} GB"
    print(
        f"  {n:>8} nodes {row['edges']:>9} edges  {name:<12} prepare {prepare:>6.1f}  fit {wall:>6.1f} s"
        f"  processor {fit:>6.1f} s  peak {peak}  accuracy {accuracy:.3f}  NMI {nmi:.3f}  ARI {ari:.3f}",
        flush=True,
    )
    return row


def slopes(rows):
    """Of each side, the exponent of the growth of the processor time of a fit, first to last size."""
    found = {}
    for name in SIDES:
        own = [row for row in rows if row["side"] == name]
        growth = math.log(own[-1]["edges"] / own[0]["edges"])
        found[name] = math.log(own[-1]["fit"][1] / own[0]["fit"][1]) / growth
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/graphs_<device>.json beside this)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]), int(args.worker[2]))
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}")
    sizes = QUICK if args.quick else SIZES
    rows = [measured(name, *size) for size in sizes for name in SIDES]
    found = slopes(rows)
    print("  slopes: " + ", ".join(f"{name} {slope:.2f}" for name, slope in found.items()))
    label = f"graphs_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    report = {"device": timing.device_name(), "jax": jax.__version__, "rows": rows, "slopes": found}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
