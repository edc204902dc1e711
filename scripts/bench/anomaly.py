"""Times the scores of SubspaceAD and the fit of its subspace, beside scikit-learn and PyTorch, in one run.

    python scripts/bench/anomaly.py             # some minutes on two cores
    python scripts/bench/anomaly.py --quick     # small sizes, to see that all runs
    python scripts/bench/anomaly.py --fit-streamed 1000000  # one fit to so many rows of width 1536, and its memory

  score   squared distances of rows from a subspace, float32, by numbers of rows, of the widths of DINOv2 small (384,
          208 directions kept) and giant (1536, 810 kept, the rank that the method has there).  Peers:
          ``scikit-learn`` (PCA: inverse_transform of transform), ``pytorch`` (two matmuls; where it is installed)
  fit     mean, covariance and eigenvectors of rows.  Peers: ``scikit-learn`` (PCA by the covariance)
  stream  most memory of a process that adds batches of 4,096 rows of width 1536 to moments: it should not grow
  images  images of 224 pixels a second, end to end: pixel patches, and DINOv2-small where work/models has it

Scores are compared first, and the run ends where they differ.

  ratio  seconds of the peer divided by those of subspace_jax; medians over rounds in which all take turns
  share  FLOPs a second over those of a square matmul of this machine in the same run
"""

import argparse
import json
import time
import types
from pathlib import Path

import memory
import numpy as np

ROWS = {"score": (1000, 4000, 8000), "fit": (4000,), "stream": (8192, 32768), "images": (16,)}
QUICK = {"score": (200,), "fit": (400,), "stream": (8192,), "images": (4,)}
WIDTHS = ((384, 208), (1536, 810))
BATCH, WIDE = 4096, 1536
MODEL = Path(__file__).parents[2] / "work" / "models" / "dinov2-small"


def rows_of(n, d, rank, seed=0):
    """Rows with most of their variance in some directions."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(d) < rank, 1, 0.05).astype(np.float32)
    return rng.standard_normal((n, d), np.float32) * scale + 0.5


def scorers(n, d, rank):
    """Calls that score the same rows by the same subspace."""
    import jax
    from sklearn.decomposition import PCA

    from subspace_jax import kernels
    from subspace_jax.anomaly import subspacead

    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.standard_normal((d, d)).astype(np.float32))[0]
    x = rows_of(n, d, rank) @ turn
    pca = PCA(rank, svd_solver="covariance_eigh").fit(rows_of(2 * d, d, rank, 2) @ turn)
    subspace = subspacead.PCASubspace(pca.mean_, pca.components_.T, np.zeros(d, np.float32), np.int32(rank))
    complement = kernels.complement_basis(jax.numpy.asarray(subspace.components))
    score = jax.jit(lambda x, mean, complement: kernels.subspace_residual(x, mean, complement=complement))
    arrays = jax.device_put((x, pca.mean_, complement))

    def by_scikit_learn():
        return np.sum((x - pca.inverse_transform(pca.transform(x))) ** 2, axis=1)

    calls = {"subspace_jax": lambda: score(*arrays), "scikit-learn": by_scikit_learn}
    try:
        import torch
    except ImportError:
        return calls
    tensor, mean, basis = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, pca.mean_, pca.components_.T))

    def by_torch():
        with torch.inference_mode():
            y = tensor - mean
            return (y - y @ basis @ basis.T).square().sum(1)

    return calls | {"pytorch": by_torch}


def fits(n, d, rank):
    """Calls that fit a subspace to the same rows."""
    import jax
    from sklearn.decomposition import PCA

    from subspace_jax.anomaly import subspacead

    x = rows_of(n, d, rank)
    on_device, update = jax.device_put(x), jax.jit(subspacead.update_moments)

    def ours():
        moments = update(subspacead.init_moments(d), on_device)
        return subspacead.solved_subspace(moments, rank=rank).components

    return {"subspace_jax": ours, "scikit-learn": lambda: PCA(rank, svd_solver="covariance_eigh").fit(x).components_}


def stream(n):
    """A call that adds batches to moments."""
    import jax

    from subspace_jax.anomaly import subspacead

    update = jax.jit(subspacead.update_moments, donate_argnums=0)

    def run():
        moments = subspacead.init_moments(WIDE)
        for start in range(0, n, BATCH):
            batch = rows_of(BATCH, WIDE, WIDE // 2, start)
            moments = jax.block_until_ready(update(moments, jax.device_put(batch)))
        return np.asarray(moments.mean)

    return run


def fit_streamed(n):
    """Fits once to rows that come in batches; prints processor time and the most memory of this process."""
    import jax

    from subspace_jax.anomaly import subspacead

    update = jax.jit(subspacead.update_moments, donate_argnums=0)
    moments = subspacead.init_moments(WIDE)
    for start in range(0, n, BATCH):
        batch = rows_of(min(BATCH, n - start), WIDE, WIDE // 2, start)
        moments = jax.block_until_ready(update(moments, jax.device_put(batch)))
    found = subspacead.solved_subspace(moments, explained_variance=0.99)
    print(f"{n} x {WIDE}: rank {int(found.rank)}, {time.process_time():.0f} s of processor time, ", end="")
    print(f"at most {memory.resident_peak() / 1e6:.0f} MB")


def images_a_second(count):
    """Images a second of each backbone, with reading from memory, resizing, scores and maps."""
    from subspace_jax.anomaly import subspacead

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 224, 224, 3), np.uint8)
    backbones = {"pixels, 256": (subspacead.PixelPatches(), ())}
    if MODEL.is_dir():
        backbones["dinov2-small, 224"] = subspacead.open_vision(MODEL, 224)
    found = {}
    for name, (backbone, params) in backbones.items():
        settings = subspacead.SubspaceADSettings(rotations=0)
        model = subspacead.SubspaceAD(backbone, params, settings).fit(images[: min(4, count)])
        model.score(images[:8])
        start = time.perf_counter()
        model.score(images)
        found[name] = count / (time.perf_counter() - start)
        print(f"  images {name:<20} {found[name]:>8.2f} a second", flush=True)
    return found


def compared(op, n, d, rank, rounds, rate):
    """A row: an operation at one size."""
    import timing

    calls = (scorers if op == "score" else fits)(n, d, rank)
    if op == "score":
        values = {name: np.asarray(call()) for name, call in calls.items()}
        error = max(float(np.max(np.abs(v / values["subspace_jax"] - 1))) for v in values.values())
        if not error <= 1e-3:
            raise SystemExit(f"{op}: the sides differ by {error:.1e}, more than is allowed")
    seconds = timing.in_turns(calls, rounds)
    ratio = {name: t / seconds["subspace_jax"] for name, t in seconds.items()}
    flops = 2 * n * d * (d - rank) if op == "score" else 2 * n * d * d
    share = flops / seconds["subspace_jax"] / rate
    for name, t in seconds.items():
        text = f"share {share:.2f}" if name == "subspace_jax" else ""
        print(f"  {op:<6} {n:>6} x {d:<5} {name:<13} {t:>9.4f} s  ratio {ratio[name]:>6.2f}  {text}", flush=True)
    return {"op": op, "rows": n, "width": d, "rank": rank, "seconds": seconds, "ratio": ratio, "share": share}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/anomaly_<device>.json beside this)")
    parser.add_argument("--fit-streamed", type=int, metavar="ROWS", help="fit once to so many rows, and end")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.fit_streamed:
        return fit_streamed(args.fit_streamed)
    if args.worker:  # does one thing in a process of its own
        side = types.SimpleNamespace(wait=lambda out: out, device_peak=lambda: None)
        return memory.report(stream(int(args.worker[2])), side)
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    sizes = QUICK if args.quick else ROWS
    rate = timing.matmul_rate(np.float32, args.rounds)
    rows = []
    for op in ("score", "fit"):
        for d, rank in WIDTHS[:1] if args.quick else WIDTHS:
            rows += [compared(op, n, d, rank, args.rounds, rate) for n in sizes[op]]
    peaks = {}
    for n in sizes["stream"]:
        peaks[n] = memory.in_own_process(__file__, "subspace_jax", "stream", n)["peak"]
        print(f"  stream {n:>7} x {WIDE}: {'-' if peaks[n] is None else f'{peaks[n] / 1e6:.0f} MB'}", flush=True)
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "rows": rows}
    report |= {"matmul_flops_per_second": rate, "stream_peak_bytes": peaks}
    report |= {"images_per_second": images_a_second(sizes["images"][0])}
    label = f"anomaly_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
