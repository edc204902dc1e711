"""Times similarities of representations beside the tools that people use for them, in one run.

    python scripts/bench/compare.py           # some minutes on two cores
    python scripts/bench/compare.py --quick   # small sizes, to see that all runs

On a busy machine give every side one thread: ``OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false``, without which threads wait for each other.

``cca``         canonical correlations of [n, p] with [n, p]; peer: scikit-learn's ``CCA`` (NIPALS, which finds its
                components one after the other), of the first 10 components at sizes where it ends in time
``linear_cka``  linear CKA, of features; peers: NumPy by kernels [n, n], which is what most code does, by features, and
                ``ckatorch`` and ``rsatoolbox`` where they can be imported (rsatoolbox: the cosine of centered
                dissimilarities, another measure of the same cost)
``debiased``    debiased linear CKA; peers: NumPy by kernels, ``ckatorch``
``null``        linear CKA of 100 shuffles; peer: NumPy by features, 100 times

  ratio  seconds of the peer divided by those of subspace_jax; medians over rounds in which all take turns
  peak   most memory on the host of a process of its own that does this one thing and nothing else, as in ``lm.py``;
         at the last size of each operation
"""

import argparse
import importlib.util
import json
import os
import time
import types
from pathlib import Path

import memory
import numpy as np

SHUFFLES = 100


def features(n, p):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, p), np.float32)
    return x, (
        x @ rng.standard_normal((p, p), np.float32) / np.sqrt(p) + rng.standard_normal((n, p), np.float32)
    ).astype(np.float32)


def ours(op, x, y):
    import jax
    import jax.numpy as jnp

    from subspace_jax import linalg, metrics
    from subspace_jax.interpret import convergent_learning as convergent

    if op == "null":
        return lambda: (
            convergent.compare(x, y, measures=("linear_cka",), null=convergent.Null(SHUFFLES, None))["linear_cka"].value
        )
    function = {
        "cca": lambda x, y: linalg.cca(x, y).rho[:10],
        "linear_cka": metrics.linear_cka,
        "debiased": lambda x, y: metrics.linear_cka(x, y, debiased=True),
    }[op]
    compiled, x, y = jax.jit(function), jnp.asarray(x), jnp.asarray(y)
    return lambda: jax.block_until_ready(compiled(x, y))


def scikit_learn(op, x, y):
    from sklearn.cross_decomposition import CCA

    if op != "cca" or x.shape[1] > 64:
        return None

    def correlations():
        u, v = CCA(n_components=10).fit_transform(x, y)
        return np.array([np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(10)])

    return correlations


def numpy_features(op, x, y):
    def cka(x, y):
        x, y = x - x.mean(0), y - y.mean(0)
        return np.square(y.T @ x).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)

    if op == "linear_cka":
        return lambda: cka(x, y)
    if op == "null":
        rng = np.random.default_rng(0)
        return lambda: [cka(x, y), *(cka(x, y[rng.permutation(len(y))]) for _ in range(SHUFFLES))][0]
    return None


def numpy_kernels(op, x, y):
    n = len(x)

    def centered(k):
        return k - k.mean(0) - k.mean(1)[:, None] + k.mean()

    def unbiased(k, l):
        through = 2 / (n - 2) * k.sum(0) @ l.sum(1)
        return (np.sum(k * l.T) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - through) / (n * (n - 3))

    def value():
        k, l = x @ x.T, y @ y.T
        if op == "linear_cka":
            k, l = centered(k), centered(l)
            return np.sum(k * l) / np.linalg.norm(k) / np.linalg.norm(l)
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        return unbiased(k, l) / np.sqrt(unbiased(k, k) * unbiased(l, l))

    return value if op in ("linear_cka", "debiased") and n <= 16_000 else None


def ckatorch(op, x, y):
    import torch
    from ckatorch.core import cka_base

    if op not in ("linear_cka", "debiased") or len(x) > 16_000:
        return None
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return lambda: cka_base(x, y, kernel="linear", unbiased=op == "debiased", method="fro_norm").numpy()


def rsatoolbox(op, x, y):
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare_cosine

    if op != "linear_cka" or len(x) > 4_000:
        return None

    def value():
        return compare_cosine(*(calc_rdm(Dataset(a.astype(np.float64)), method="euclidean") for a in (x, y)))

    return value


# Name to what is imported, and what makes the call.
SIDES = {
    "subspace_jax": ("jax", ours),
    "scikit-learn": ("sklearn", scikit_learn),
    "numpy, features": ("numpy", numpy_features),
    "numpy, kernels": ("numpy", numpy_kernels),
    "ckatorch": ("ckatorch", ckatorch),
    "rsatoolbox": ("rsatoolbox", rsatoolbox),
}
SIZES = {
    "cca": ((2_000, 32), (2_000, 64), (10_000, 64)),
    "linear_cka": ((1_000, 256), (4_000, 256), (100_000, 256), (4_000, 1_024)),
    "debiased": ((1_000, 256), (4_000, 256)),
    "null": ((1_000, 256), (4_000, 256)),
}
QUICK = {op: ((200, 16),) for op in SIZES}


def measure(sizes, rounds):
    """Rows of one operation and size each; the sides are compared first."""
    import timing

    names, rows = [name for name, (module, _) in SIDES.items() if importlib.util.find_spec(module)], []
    for op, pairs in sizes.items():
        for n, p in pairs:
            given = features(n, p)
            calls = {name: SIDES[name][1](op, *given) for name in names}
            calls = {name: call for name, call in calls.items() if call}
            values = {name: np.asarray(call()) for name, call in calls.items()}
            # rsatoolbox measures something else, scikit-learn's later components are not converged.
            of_all = {name: value for name, value in values.items() if name != "rsatoolbox"}
            error = max(float(np.abs(np.ravel(v - values["subspace_jax"])[:3]).max()) for v in of_all.values())
            if not error <= 5e-3:
                raise SystemExit(f"{op}: the sides differ by {error:.1e}, more than is allowed")
            seconds = timing.in_turns(calls, rounds)
            measured = calls if (n, p) == pairs[-1] else ()
            peaks = {name: memory.in_own_process(__file__, name, op, n, p)["peak"] for name in measured}
            ratio = {name: t / seconds["subspace_jax"] for name, t in seconds.items()}
            rows.append(
                {"op": op, "n": n, "p": p, "error": error, "seconds": seconds, "ratio": ratio, "peak_bytes": peaks}
            )
            for name, t in seconds.items():
                peak = "" if peaks.get(name) is None else f"{peaks[name] / 1e6:.0f} MB"
                print(
                    f"  {op:<11} {n:>7} x {p:<5} {name:<16} {t:>9.4f} s  ratio {ratio[name]:>7.2f}  {peak}", flush=True
                )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/compare_<device>.json beside this)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:  # imports one of the sides only
        name, op, n, p = args.worker
        side = types.SimpleNamespace(wait=lambda out: out, device_peak=lambda: None)
        return memory.report(SIDES[name][1](op, *features(int(n), int(p))), side)
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    label = f"compare_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "quick": args.quick}
    report["threads"] = os.environ.get("OPENBLAS_NUM_THREADS", "all")
    report["compare"] = measure(QUICK if args.quick else SIZES, args.rounds)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
