"""Compares losses over pairs of a batch with plain PyTorch, then times both, in one run.

    python scripts/bench/represent_losses.py           # batches of 256, 1024 and 4096, a few minutes on two cores
    python scripts/bench/represent_losses.py --quick   # a small batch, to see that all runs

A step is a loss of B anchors and B keys of 128 dimensions, 8 of each class, with its gradients by both: InfoNCE with
several positives (``hydra_loss``), the supervised contrastive loss, and the margin loss of sampled pairs.  Both sides
get the same arrays, and are first compared: the run ends there if losses or gradients differ.  All is float32.

  ms      a step; medians over rounds in which the sides take turns: read the ratio
  ratio   time of PyTorch divided by that of subspace_jax
  peak    most memory of a process of its own that does this one thing and nothing else: on a CPU its resident memory,
          libraries and compiling included; "later" is that of the calls after the first two.  On a GPU both are what
          was in use on the device

PyTorch holds logits and masks [B, B]; subspace_jax holds a block of keys, [B, block].
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import memory
import numpy as np

SIDES = {"subspace_jax": "represent_losses_jax", "torch": "represent_losses_torch"}
OPS = ("infonce", "contrastive", "margin")
RUN = {"temperature": 0.1, "per_class": 8, "block_size": 512, "beta": 1.2, "margin": 0.2, "cutoff": 0.5}
WIDTH = 128
ALLOWED = 1e-4  # float32 sums of thousands of terms in another order


def arrays_of(batch):
    """Anchors and keys around a center for each class, of unit length, and their classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(batch // RUN["per_class"], dtype=np.int32), RUN["per_class"])
    centers = rng.standard_normal((len(labels) // RUN["per_class"], WIDTH))
    rows = [centers[labels] + rng.standard_normal((batch, WIDTH)) for _ in range(2)]
    return *(np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in rows), labels


def check(calls, sides):
    """Compares what the sides compute; raises SystemExit where they differ by more than rounding."""
    (ours, our_grads), (theirs, their_grads) = (sides[name].to_numpy(call()) for name, call in calls.items())
    found = {
        "loss": abs(ours - theirs) / abs(theirs),
        "gradients": float(np.max(np.abs(our_grads - their_grads)) / np.max(np.abs(their_grads))),
    }
    if not max(found.values()) <= ALLOWED:
        raise SystemExit(f"the sides differ by more than {ALLOWED:.0e}: {found}")
    return found


def worker(side, op, batch):
    module = importlib.import_module(SIDES[side])
    memory.report(module.step(op, arrays_of(int(batch)), RUN), module)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small batch, which says nothing about speed")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="what to run (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: results/represent_losses_<device>.json beside this script)"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(*args.worker)  # imports one of the sides only
    sides = {name: importlib.import_module(module) for name, module in SIDES.items()}
    import jax
    import timing
    import torch

    if timing.on_accelerator() != torch.cuda.is_available():
        raise SystemExit("One side has a GPU and the other has none; hide it from both, or install both for it.")
    start = time.perf_counter()
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{timing.device_name()}, {named}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    report = {"device": timing.device_name(), **versions, "rounds": args.rounds, "settings": RUN, "rows": []}
    for op in args.ops:
        for batch in (64,) if args.quick else (256, 1024, 4096):
            calls = {name: side.step(op, arrays_of(batch), RUN) for name, side in sides.items()}
            row = {"op": op, "batch": batch, "check": check(calls, sides)}
            timed = {name: lambda call=call: call()[0] for name, call in calls.items()}  # the loss is waited for
            row["seconds"] = timing.in_turns(timed, args.rounds)
            row["ratio"] = row["seconds"]["torch"] / row["seconds"]["subspace_jax"]
            row["memory"] = {name: memory.in_own_process(__file__, name, op, batch) for name in SIDES}
            report["rows"].append(row)
            show(row)
    name = f"represent_losses_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


def show(row):
    for name, seconds in row["seconds"].items():
        peak, later = ("-" if x is None else f"{x / 1e6:.0f} MB" for x in row["memory"][name].values())
        print(f"  {row['op']:<12} B {row['batch']:<5} {name:<13} {1e3 * seconds:>8.2f} ms  peak {peak}, later {later}")
    print(f"  {row['op']:<12} B {row['batch']:<5} ratio {row['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
