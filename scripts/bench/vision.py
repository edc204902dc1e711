"""Compares subspace_jax with Hugging Face transformers (PyTorch) on ViT-S/16 and ResNet-50, then times both.

    python scripts/bench/vision.py                # images of 224 x 224: some minutes on two cores
    python scripts/bench/vision.py --quick        # small models and images, to see that all runs

Random weights are written once, and both sides read that folder: the same weights, the same images.  Two things are
measured of each model: a forward pass with its logits, and a whole training step (loss, gradients, SGD with momentum;
the ResNet with statistics of the batch, and their running means).  The two sides are first compared: logits, and the
losses of three steps; the run ends there if they differ.  On a CPU all is float32; on a GPU activations are bfloat16.
Then the input pipeline runs by itself, from JPEG files in folders to batches in memory; it has no peer here.

  images/s   medians over rounds in which the sides take turns: read the ratio
  ratio      images/s of subspace_jax divided by those of transformers
  mm         share of the rate of a large matmul, measured in the same run, by the multiplications of plain
             convolutions: an algorithm that does fewer can exceed 1
  MFU        share of the data sheet's bfloat16 rate, on GPUs that are known
  peak       most memory of a process of its own that does this one thing and nothing else, as in ``lm.py``

Both sides use the threads that they take by themselves.  Where only CPUs compute, run it with the memory settings of
docs/start.md, for both sides.
"""

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path

import lm
import memory
import numpy as np

SIDES = {"subspace_jax": "vision_jax", "transformers": "vision_torch"}
MODELS = ("vit_s", "resnet50")
OPS = ("forward", "training")
# Multiplications with additions in a forward pass of one image of 224 x 224, products and convolutions alone.
MACS = {"vit_s": 4.60e9, "resnet50": 4.09e9}


def settings(quick, accelerator):
    return {
        "quick": quick,
        "size": 32 if quick else 224,
        "batch": 4 if quick else 256 if accelerator else 8,
        "classes": 10 if quick else 1000,
        "dtype": "bfloat16" if accelerator else "float32",
        "learning_rate": 1e-3,
        "momentum": 0.9,
    }


def images_of(run):
    """Standardised images ``[batch, size, size, 3]`` and their labels."""
    rng = np.random.default_rng(0)
    shape = (run["batch"], run["size"], run["size"], 3)
    return rng.normal(size=shape).astype(np.float32), rng.integers(run["classes"], size=run["batch"]).astype(np.int32)


def check(op, calls, sides, narrow):
    """Compares what the sides compute; raises SystemExit where they differ by more than rounding."""
    times = 3 if op == "training" else 1
    ours, theirs = (np.stack([sides[name].to_numpy(call()) for _ in range(times)]) for name, call in calls.items())
    error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    # Batch statistics of few images, and a step along their gradients, enlarge the rounding of fifty convolutions.
    allowed = 5e-2 if narrow else 1e-3
    what = {"forward": "logits", "training": "losses of three steps"}[op]
    print(f"  {op:<9} {what:<22} error {error:.1e}  allowed {allowed:.0e}", flush=True)
    if not error <= allowed:
        raise SystemExit(f"{op}: the sides differ by more than is allowed")
    return {"what": what, "error": error, "allowed": allowed}


def worker(side, op, folder, run):
    run, module = json.loads(run), importlib.import_module(SIDES[side])
    memory.report(getattr(module, op)(folder, *images_of(run), run), module)


def pipeline(folder, run, rounds):
    """Images per second from files to batches, of training and of evaluation; medians over passes."""
    from PIL import Image

    from subspace_jax import data

    count, (height, width) = (16, (40, 50)) if run["quick"] else (256, (375, 500))
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"class{i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        # Smooth pictures: noise would make files several times as large as photographs.
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)
    images, batch = data.image_folder(folder), min(run["batch"] * 4, count // 2)
    size, steps = run["size"], max(2, count // batch)
    change = data.TrainImage(size, as_bytes=True)
    passes = {
        "training": lambda: data.train_batches(images, batch_size=batch, seed=0, transform=change),
        "evaluation": lambda: data.eval_batches(
            images.map(data.ImageProcessor.evaluation(size, as_bytes=True)), batch_size=batch
        ),
    }
    found = {"files": count, "pixels": [height, width], "batch": batch}
    for name, make in passes.items():
        rates = []
        for _ in range(rounds):
            batches = iter(make())
            start = time.perf_counter()
            rows = sum(len(next(batches)["labels"]) for _ in range(steps))
            rates.append(rows / (time.perf_counter() - start))
        found[name] = float(np.median(rates))
        print(f"  input pipeline, {name:<10} {found[name]:>8.1f} images/s", flush=True)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, which say nothing about speed")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which to run (default: all)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="what to run (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/vision_<device>.json beside this)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(*args.worker)  # imports one of the sides only
    sides = {name: importlib.import_module(module) for name, module in SIDES.items()}
    import jax
    import timing
    import torch
    import transformers

    if timing.on_accelerator() != torch.cuda.is_available():
        raise SystemExit("One side has a GPU and the other has none; hide it from both, or install both for it.")
    start = time.perf_counter()
    run = settings(args.quick, timing.on_accelerator())
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{timing.device_name()}, {named}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    product = timing.matmul_rate(run["dtype"])
    sheet = next((rate for name, rate in lm.PEAKS.items() if name in timing.device_name()), None)
    report = {"device": timing.device_name(), **versions, "rounds": args.rounds, "settings": run}
    report |= {"matmul_flops_per_second": product, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            folder = Path(temporary) / model
            params = sides["subspace_jax"].write(folder, model, run)
            batch = f"{run['batch']} images of {run['size']} x {run['size']}"
            print(f"{model} of {params / 1e6:.1f} M parameters, {batch}, {run['dtype']}")
            for op in args.ops:
                row = measure(model, op, folder, run, sides, args.rounds, timing)
                for key, rate in (("share_of_matmul", product), ("mfu", sheet)):
                    flops = 2 * MACS[model] * (3 if op == "training" else 1)
                    # What is counted is the full size's.
                    row[key] = (
                        {name: r * flops / rate for name, r in row["images_per_second"].items()}
                        if rate and not run["quick"]
                        else None
                    )
                report["rows"].append(row)
                show(row)
        report["pipeline"] = pipeline(Path(temporary) / "photos", run, args.rounds)
    name = f"vision_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


def measure(model, op, folder, run, sides, rounds, timing):
    """Compares and times the sides; returns the row of the report."""
    calls = {name: getattr(side, op)(folder, *images_of(run), run) for name, side in sides.items()}
    checked = check(op, calls, sides, run["dtype"] == "bfloat16")
    seconds = timing.in_turns(calls, rounds)
    del calls  # the weights and the optimizer state of both
    rate = {name: run["batch"] / t for name, t in seconds.items()}
    row = {"model": model, "op": op, "check": checked, "seconds": seconds, "images_per_second": rate}
    row["ratio"] = rate["subspace_jax"] / rate["transformers"]
    row["memory"] = {name: memory.in_own_process(__file__, name, op, folder, json.dumps(run)) for name in SIDES}
    return row


def show(row):
    for name, rate in row["images_per_second"].items():
        shares = "".join(
            f"  {label} {row[key][name]:.2f}" for label, key in (("mm", "share_of_matmul"), ("MFU", "mfu")) if row[key]
        )
        peak, later = ("-" if x is None else f"{x / 1e6:.0f} MB" for x in row["memory"][name].values())
        print(f"    {row['op']:<9} {name:<13} {rate:>9.2f} images/s{shares}  peak {peak}, later {later}")
    print(f"    {row['op']:<9} ratio {row['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
