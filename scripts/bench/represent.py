"""Times what representation learning computes, beside the tools that people use for it, in one run.

    python scripts/bench/represent.py                          # all sections, some minutes on two cores
    python scripts/bench/represent.py --only retrieval --quick # small sizes, to see that all runs

``retrieval``: metrics in galleries of growing size, vectors of width 128 in 1,000 classes, float32:

  cmc            CMC at 1, 5 and 10 of 1,000 queries, by the nearest items
  retrieval_map  mean average precision of 100 queries, by the ranks of all items
  recall_at_k    Recall@1, 5 and 10 of 1,000 examples among themselves: an overhead more than work

Peers: ``scikit-learn`` (brute-force nearest neighbours; ``average_precision_score`` query by query) and, where it can
be imported, ``faiss`` (``IndexFlatL2``; it has no mean average precision).  Values are compared first, and the run ends
where they differ.

  ratio  seconds of the peer divided by those of subspace_jax; medians over rounds in which all take turns
  peak   most memory on the host of a process of its own that does this one thing and nothing else, as in ``lm.py``
  held   in JSON: that minus the peak at the smallest gallery, less what the gallery itself has grown by

Each section is a function that returns rows, and joins ``SECTIONS``.
"""

import argparse
import importlib.util
import json
import time
import types
from pathlib import Path

import memory
import numpy as np

KS = (1, 5, 10)
OPS = ("cmc", "retrieval_map", "recall_at_k")
QUERIES = {"cmc": 1000, "retrieval_map": 100, "recall_at_k": 1000}
WIDTH, CLASSES = 128, 1000


def vectors(op, items):
    """Queries and items with their labels: class centres and noise."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((CLASSES, WIDTH), np.float32)
    labels = [rng.integers(CLASSES, size=n) for n in (QUERIES[op], items)]
    found = [centers[y] + 2 * rng.standard_normal((len(y), WIDTH), np.float32) for y in labels]
    return *found, *(y.astype(np.int32) for y in labels)


def ours(op, query, gallery, query_labels, gallery_labels):
    import jax

    from subspace_jax import metrics

    of_gallery = (query, gallery, query_labels, gallery_labels)
    arrays = jax.device_put((query, query_labels) if op == "recall_at_k" else of_gallery)
    ks = () if op == "retrieval_map" else (KS,)
    compiled = jax.jit(lambda *arrays: getattr(metrics, op)(*arrays, *ks))
    return lambda: jax.block_until_ready(compiled(*arrays))


def scikit_learn(op, query, gallery, query_labels, gallery_labels):
    from sklearn.metrics import average_precision_score
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.neighbors import NearestNeighbors

    def precision():
        found = []
        for start in range(0, len(query), 64):
            some = slice(start, start + 64)
            scores = -euclidean_distances(query[some], gallery)
            matches = gallery_labels[None] == query_labels[some, None]
            found += [average_precision_score(m, s) for m, s in zip(matches, scores, strict=True) if m.any()]
        return np.mean(found)

    def search(queries, rows, k):
        return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows).kneighbors(queries)[1]

    if op == "retrieval_map":
        return precision
    return lambda: _shares(op, search, query, gallery, query_labels, gallery_labels)


def flat_index(op, query, gallery, query_labels, gallery_labels):
    import faiss

    def search(queries, rows, k):
        index = faiss.IndexFlatL2(rows.shape[1])
        index.add(rows)
        return index.search(queries, k)[1]

    if op == "retrieval_map":
        return None
    return lambda: _shares(op, search, query, gallery, query_labels, gallery_labels)


def _shares(op, search, query, gallery, query_labels, gallery_labels):
    """Shares of queries with a match among the nearest, by a peer's search."""
    if op == "recall_at_k":
        nearest = search(query, query, max(KS) + 1)
        # The example itself is found first.
        hits, has_match = query_labels[nearest[:, 1:]] == query_labels[:, None], np.bincount(query_labels) > 1
    else:
        hits = gallery_labels[search(query, gallery, max(KS))] == query_labels[:, None]
        has_match = np.bincount(gallery_labels, minlength=CLASSES) > 0
    return np.stack([hits[:, :k].any(axis=1)[has_match[query_labels]].mean() for k in KS])


# Name to what is imported, and what makes the call.
SIDES = {"subspace_jax": ("jax", ours), "scikit-learn": ("sklearn", scikit_learn), "faiss": ("faiss", flat_index)}


def retrieval(quick, rounds):
    """Rows of retrieval metrics: an operation and a gallery each."""
    import timing

    sizes = (1000, 3000) if quick else (10_000, 30_000, 100_000)
    names = [name for name, (module, _) in SIDES.items() if importlib.util.find_spec(module)]
    rows, first = [], {}
    for op in OPS:
        for items in sizes[: 1 if op == "recall_at_k" else None]:
            given = vectors(op, items)
            calls = {name: SIDES[name][1](op, *given) for name in names}
            calls = {name: call for name, call in calls.items() if call}
            values = {name: np.asarray(call()) for name, call in calls.items()}
            error = max(float(np.max(np.abs(value - values["subspace_jax"]))) for value in values.values())
            # Distances in float32: one near tie of 1,000 queries may be ranked otherwise.
            if not error <= 2e-3:
                raise SystemExit(f"{op}: the sides differ by {error:.1e}, more than is allowed")
            seconds = timing.in_turns(calls, rounds)
            peaks = {name: memory.in_own_process(__file__, name, op, items)["peak"] for name in calls}
            first.setdefault(op, (items, peaks))
            row = {"op": op, "items": items, "error": error, "seconds": seconds, "peak_bytes": peaks}
            row["ratio"] = {name: t / seconds["subspace_jax"] for name, t in seconds.items()}
            grown = (items - first[op][0]) * WIDTH * 4
            row["held_bytes"] = {name: peak and peak - first[op][1][name] - grown for name, peak in peaks.items()}
            rows.append(row)
            for name, t in seconds.items():
                peak = "-" if peaks[name] is None else f"{peaks[name] / 1e6:.0f} MB"
                print(
                    f"  {op:<14} {items:>7} items  {name:<13} {t:>8.3f} s  ratio {row['ratio'][name]:>5.2f}  {peak}",
                    flush=True,
                )
    return rows


SECTIONS = {"retrieval": retrieval}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/represent_<device>.json beside this)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:  # imports one of the sides only
        name, op, items = args.worker
        side = types.SimpleNamespace(wait=lambda out: out, device_peak=lambda: None)
        return memory.report(SIDES[name][1](op, *vectors(op, int(items))), side)
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    label = f"represent_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "quick": args.quick}
    # Sections that are not run keep what was measured before.
    before = json.loads(output.read_text()) if output.exists() else {}
    report = before | report | {name: SECTIONS[name](args.quick, args.rounds) for name in args.only}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
