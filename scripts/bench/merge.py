"""Compares merging of folders with the same rules in plain PyTorch or NumPy, which hold all models in memory.

    python scripts/bench/merge.py           # models up to 67 million parameters, ten minutes on two cores
    python scripts/bench/merge.py --quick   # small ones, to see that all runs

Three models and a base are folders of bfloat16 weights, alike but for noise.  Each side reads them, merges them and
writes the result in a process of its own; the results are first compared.  The peer is PyTorch where it is installed,
else NumPy: TIES there takes `kthvalue` (`partition`) of flattened task vectors in float32.

  s       from the start of reading to the end of writing; medians over rounds in which the sides take turns
  ratio   time of the peer divided by that of subspace_jax
  peak    most resident memory of the process, mapped files included, less that of one that merges tiny models, over the
          size of a model in bfloat16
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

METHODS = ("average", "task-arithmetic", "ties")
NAMES = ("base", "a", "b", "c")
WIDTHS = (512, 1024, 2048)  # each layer has four matrices of this width
LAYERS = 4
_HIGHEST = 'next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))'


def write_models(folder, width, layers):
    from subspace_jax import interop

    dtype = np.dtype(ml_dtypes.bfloat16)
    shapes = {f"layers.{i}.w{j}.weight": ((width, width), dtype) for i in range(layers) for j in range(4)}
    for seed, name in enumerate(NAMES):
        (folder / name).mkdir()

        def tensors(seed=seed):
            for i in range(len(shapes)):
                x = np.random.default_rng(i).standard_normal((width, width), np.float32)
                noise = np.random.default_rng((seed, i)).standard_normal((width, width), np.float32)
                yield (x + 0.1 * seed * noise).astype(dtype)

        interop.write_safetensors(folder / name / "model.safetensors", shapes, tensors())


def ours(folder, method, out):
    from subspace_jax.merge.subspace_fusion import folders
    from subspace_jax.merge.subspace_fusion.settings import MergeSettings

    models = [folder / name for name in NAMES[1:]]
    folders.merge_folders(models, out, MergeSettings(method), base=folder / "base")


def with_torch(folder, method, out):
    import torch
    from safetensors.torch import load_file, save_file

    base, *models = (load_file(folder / name / "model.safetensors") for name in NAMES)
    taus = [{k: m[k].float() - base[k].float() for k in base} for m in models]
    if method == "average":
        merged = {k: sum(m[k].float() for m in models) / len(models) for k in base}
    elif method == "task-arithmetic":
        merged = {k: base[k].float() + 0.3 * sum(tau[k] for tau in taus) for k in base}
    else:
        flat = torch.stack([torch.cat([tau[k].flatten() for k in sorted(base)]) for tau in taus])
        size = flat.shape[1]
        low = flat.abs().kthvalue(size - int(0.2 * size), dim=1, keepdim=True).values
        flat = torch.where(flat.abs() >= low, flat, 0)
        sign = torch.sign(flat.sum(dim=0))
        sign = torch.where(sign == 0, torch.sign(sign.sum()), sign)
        total = torch.where(torch.where(sign > 0, flat > 0, flat < 0), flat, 0).sum(dim=0)
        parts = torch.split(total, [base[k].numel() for k in sorted(base)])
        merged = {k: base[k].float() + 0.3 * x.view_as(base[k]) for k, x in zip(sorted(base), parts, strict=True)}
    out.mkdir()
    save_file({k: x.to(base[k].dtype) for k, x in merged.items()}, out / "model.safetensors")


def with_numpy(folder, method, out):
    from safetensors.numpy import load_file, save_file

    base, *models = (load_file(folder / name / "model.safetensors") for name in NAMES)
    taus = [{k: m[k].astype(np.float32) - base[k].astype(np.float32) for k in base} for m in models]
    if method == "average":
        merged = {k: sum(m[k].astype(np.float32) for m in models) / len(models) for k in base}
    elif method == "task-arithmetic":
        merged = {k: base[k].astype(np.float32) + 0.3 * sum(tau[k] for tau in taus) for k in base}
    else:
        flat = np.stack([np.concatenate([tau[k].ravel() for k in sorted(base)]) for tau in taus])
        rank = flat.shape[1] - int(0.2 * flat.shape[1]) - 1
        low = np.partition(np.abs(flat), rank, axis=1)[:, rank : rank + 1]
        flat = np.where(np.abs(flat) >= low, flat, 0)
        sign = np.sign(flat.sum(axis=0))
        sign = np.where(sign == 0, np.sign(sign.sum()), sign)
        total = np.where(np.where(sign > 0, flat > 0, flat < 0), flat, 0).sum(axis=0)
        parts = np.split(total, np.cumsum([base[k].size for k in sorted(base)])[:-1])
        merged = {
            k: base[k].astype(np.float32) + np.float32(0.3) * x.reshape(base[k].shape)
            for k, x in zip(sorted(base), parts, strict=True)
        }
    out.mkdir()
    save_file({k: x.astype(base[k].dtype) for k, x in merged.items()}, out / "model.safetensors")


SIDES = {"subspace_jax": ours, "torch": with_torch, "numpy": with_numpy}


def worker(side, folder, method, out):
    """Merges twice, the first time to compile and to read files into the page cache; prints seconds and peak."""
    import shutil

    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        SIDES[side](pathlib.Path(folder), method, pathlib.Path(out))
        seconds = time.perf_counter() - start
    print(json.dumps([seconds, 1024 * eval(_HIGHEST)]))


def measured(side, folder, method, out):
    command = [sys.executable, __file__, "--worker", side, str(folder), method, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, {method}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def difference(one, two):
    from subspace_jax import interop

    a, b = (interop.open_folder(folder) for folder in (one, two))
    return max(
        float(np.max(np.abs(np.asarray(a[k].read(), np.float32) - np.asarray(b[k].read(), np.float32)))) for k in a
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file (default: results/merge_cpu.json)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(*args.worker)
        return
    peer, rows = "torch" if importlib.util.find_spec("torch") else "numpy", []
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        floors = {}
        for width in (16, *((32,) if args.quick else WIDTHS)):
            folder = place / str(width)
            folder.mkdir()
            write_models(folder, width, LAYERS)
            for method in METHODS:
                found = {"subspace_jax": [], peer: []}
                for _ in range(1 if width == 16 else args.rounds):
                    for side, own in found.items():
                        own.append(measured(side, folder, method, folder / f"{side}_{method}"))
                if width == 16:
                    floors[method] = {side: own[0][1] for side, own in found.items()}
                    continue
                rows.append(row(found, floors[method], folder, method, peer, width))
    file = args.output or pathlib.Path(__file__).parent / "results" / "merge_cpu.json"
    if not args.quick or args.output:
        file.write_text(json.dumps({"peer": peer, "models": 3, "rows": rows}, indent=2) + "\n")
        print(f"Wrote {file}")


def row(found, floors, folder, method, peer, width):
    size = 2 * 4 * LAYERS * width * width
    seconds = {side: statistics.median(x for x, _ in own) for side, own in found.items()}
    peaks = {side: (max(x for _, x in own) - floors[side]) / size for side, own in found.items()}
    error = difference(*(folder / f"{side}_{method}" for side in found))
    if error > 0.05:  # a unit in the last place of bfloat16 at 4
        raise SystemExit(f"the sides differ by {error:.1e}, {method} at {width}")
    ratio = seconds[peer] / seconds["subspace_jax"]
    print(
        f"{size / 2e6:6.1f} M  {method:<16} {seconds['subspace_jax']:7.2f} s  ratio {ratio:5.2f}  "
        f"peak {peaks['subspace_jax']:5.1f} models, {peer} {peaks[peer]:5.1f}",
        flush=True,
    )
    return {
        "parameters": size // 2,
        "method": method,
        "seconds": seconds,
        "ratio": ratio,
        "peak_over_model": peaks,
        "error": error,
    }


if __name__ == "__main__":
    main()
