"""Compares subspace_jax with Hugging Face transformers (PyTorch) on one GPT-2, then times both, in one run.

    python scripts/bench/lm.py                # the size of GPT-2 small, some minutes on two cores
    python scripts/bench/lm.py --quick        # a small model, to see that all runs

Random weights are written once, and both sides read that folder: the same weights, the same tokens.  Three things are
measured: a forward pass with the logits of all places, a whole training step (loss, gradients, AdamW), and greedy
generation with a cache of keys and values.  The two sides are first compared: logits, the losses of three steps, and
generated tokens; the run ends there if they differ.  On a CPU all is float32; on a GPU activations are bfloat16.

  tokens/s   tokens read, or new tokens in generation; medians over rounds in which the sides take turns: read the ratio
  ratio      tokens/s of subspace_jax divided by those of transformers
  mm         share of the rate of a large product, measured in the same run (not for generation)
  MFU        share of the data sheet's bfloat16 rate, on GPUs that are known (not for generation)
  peak       most memory of a process of its own that does this one thing and nothing else: on a CPU its resident
             memory, libraries, reading and compiling included; "later" is that of the calls after the first two.
             On a GPU both are what was in use on the device, the first ones included.

Both sides use the threads that they take by themselves.  Where only CPUs compute, run it with the memory settings of
docs/start.md, for both sides.
"""

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path

import memory
import numpy as np

SIDES = {"subspace_jax": "lm_jax", "transformers": "lm_torch"}
OPS = ("forward", "training", "generation")
SMALL = {"layers": 12, "width": 768, "heads": 12, "vocab": 50257}
QUICK = {"layers": 2, "width": 64, "heads": 4, "vocab": 1000}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 operations per second, by the data sheets


def settings(quick, accelerator):
    model = QUICK if quick else SMALL
    batch, length = (2, 32) if quick else (8, 1024) if accelerator else (2, 256)
    return {
        "model": model,
        "batch": batch,
        "length": length,
        "prompt": 8 if quick else 32,
        "new": 8 if quick else 128 if accelerator else 32,
        "dtype": "bfloat16" if accelerator else "float32",
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
    }


def tokens_of(run):
    shape = (run["batch"], run["length"] + 1)
    return np.random.default_rng(0).integers(run["model"]["vocab"], size=shape).astype(np.int32)


def check(op, calls, sides, narrow):
    """Compares what the sides compute; raises SystemExit where they differ by more than rounding."""
    times = 3 if op == "training" else 1
    ours, theirs = ([sides[name].to_numpy(call()) for _ in range(times)] for name, call in calls.items())
    ours, theirs = np.stack(ours), np.stack(theirs)
    if op == "generation":
        error, allowed = float(np.mean(ours != theirs)), 1.0 if narrow else 0.0  # two near logits may change places
    else:
        error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
        allowed = 5e-2 if narrow else 1e-4
    what = {"forward": "logits", "training": "losses of three steps", "generation": "tokens that differ"}[op]
    print(f"  {op:<11} {what:<22} error {error:.1e}  allowed {allowed:.0e}", flush=True)
    if not error <= allowed:
        raise SystemExit(f"{op}: the sides differ by more than is allowed")
    return {"what": what, "error": error, "allowed": allowed}


def worker(side, op, folder, run):
    run, module = json.loads(run), importlib.import_module(SIDES[side])
    memory.report(getattr(module, op)(folder, tokens_of(run), run), module)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, which says nothing about speed")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="what to run (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/lm_<device>.json beside this script)")
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
    sheet = next((rate for name, rate in PEAKS.items() if name in timing.device_name()), None)
    report = {"device": timing.device_name(), **versions, "rounds": args.rounds, "settings": run}
    report |= {"matmul_flops_per_second": product, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        params, flops = sides["subspace_jax"].write(folder, **run["model"], length=run["length"])
        print(f"GPT-2 of {params / 1e6:.1f} M parameters, {run['batch']} x {run['length']} tokens, {run['dtype']}")
        for op in args.ops:
            calls = {name: getattr(side, op)(folder, tokens_of(run), run) for name, side in sides.items()}
            checked = check(op, calls, sides, run["dtype"] == "bfloat16")
            seconds = timing.in_turns(calls, args.rounds)
            del calls  # the weights and the optimizer state of both
            tokens = run["batch"] * (run["new"] if op == "generation" else run["length"])
            rate = {name: tokens / t for name, t in seconds.items()}
            per_token = {"forward": flops, "training": 3 * flops, "generation": None}[op]
            row = {"op": op, "check": checked, "seconds": seconds, "tokens_per_second": rate}
            row["ratio"] = rate["subspace_jax"] / rate["transformers"]
            row["share_of_matmul"] = per_token and {name: r * per_token / product for name, r in rate.items()}
            row["mfu"] = per_token and sheet and {name: r * per_token / sheet for name, r in rate.items()}
            row["memory"] = {name: memory.in_own_process(__file__, name, op, folder, json.dumps(run)) for name in SIDES}
            report["rows"].append(row)
            show(row)
    name = f"lm_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


def show(row):
    for name, rate in row["tokens_per_second"].items():
        shares = "".join(
            f"  {label} {row[key][name]:.2f}" for label, key in (("mm", "share_of_matmul"), ("MFU", "mfu")) if row[key]
        )
        peak, later = ("-" if x is None else f"{x / 1e6:.0f} MB" for x in row["memory"][name].values())
        print(f"    {row['op']:<11} {name:<13} {rate:>10.1f} tokens/s{shares}  peak {peak}, later {later}")
    print(f"    {row['op']:<11} ratio {row['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
