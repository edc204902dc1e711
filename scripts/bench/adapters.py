"""Compares LoRA and DoRA of subspace_jax with Hugging Face PEFT (PyTorch) on a stack of linear layers, in one run.

    python scripts/bench/adapters.py                # width 2048, 512 tokens: some minutes on two cores
    python scripts/bench/adapters.py --quick        # a small width, to see that everything runs

Three frozen square layers with tanh between, all adapted, so that gradients pass through layers as in a model.  Both
sides have the same weights, factors and tokens.  A forward pass and a training step (loss, gradients of the adapters,
AdamW) are measured.  First the outputs and the losses of three steps of both sides are compared; the run ends if they
differ.  Dtypes are float32 on a CPU, bfloat16 weights and activations on a GPU.

  ms         medians over rounds in which all alternate, noise is half of the interquartile range
  speed-up   time of PEFT divided by that of subspace_jax
  over LoRA  time of DoRA divided by that of LoRA, on the same side
  at most    the speed-up of a program that computes only the matmuls of the method, at the rate of a large matmul,
             measured in the same run
  peak       peak memory of a separate process: on a CPU its resident memory, including libraries and compilation;
             "later" is that of the calls after the first two

Both sides use their default number of threads.  On CPUs, run it with the memory settings of docs/start.md, for both
sides.
"""

import argparse
import importlib
import json
import os
import statistics
import time
from pathlib import Path

import memory
import numpy as np

SIDES = {"subspace_jax": "adapters_jax", "peft": "adapters_torch"}
METHODS, OPS = ("lora", "dora"), ("forward", "training")
LAYERS = 3


def settings(quick, accelerator):
    width, tokens = (64, 32) if quick else (4096, 8192) if accelerator else (2048, 512)
    return {
        "width": width,
        "tokens": tokens,
        "layers": LAYERS,
        "dtype": "bfloat16" if accelerator else "float32",
        "learning_rate": 1e-4,
    }


def arrays_of(run):
    """Weights ``[in, out]`` and factors by layer, and the tokens; B is not zero, so that the update counts."""
    rng, n, r = np.random.default_rng(0), run["width"], run["rank"]

    def normal(*shape, scale):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    layers = [
        {"w": normal(n, n, scale=n**-0.5), "a": normal(n, r, scale=n**-0.5), "b": normal(r, n, scale=0.02)}
        for _ in range(run["layers"])
    ]
    return layers, normal(run["tokens"], n, scale=1.0)


def flops(op, run):
    """FLOPs of the matmuls that a method needs."""
    tokens, width, rank, layers = (run[name] for name in ("tokens", "width", "rank", "layers"))
    base, factor = 2 * tokens * width**2, 2 * tokens * width * rank
    total = layers * (base + 2 * factor)
    if run["method"] == "dora":
        total += layers * 2 * width**2 * rank  # the norm
    if op == "training":
        # The gradients of the factors and of what is between them; the tokens have no gradient.
        total += layers * 3 * factor + (layers - 1) * (base + factor)
    return total


def check(op, calls, sides, narrow):
    """Compares the results of the sides; raises SystemExit where they differ by more than rounding."""
    times = 3 if op == "training" else 1
    ours, theirs = (np.stack([sides[name].to_numpy(call()) for _ in range(times)]) for name, call in calls.items())
    error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    allowed = 5e-2 if narrow else 1e-4
    if not error <= allowed:
        raise SystemExit(f"{op}: the sides differ by {error:.1e}, and {allowed:.0e} is allowed")
    return error


def in_turns(calls, rounds):
    """Medians and half interquartile ranges of seconds, over rounds in which all alternate."""
    import timing

    for call in calls.values():
        for _ in range(2):
            timing.wait(call())
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            timing.wait(call())
            times[key].append(time.perf_counter() - start)
    found = {}
    for key, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[key] = {"median": middle, "noise": (high - low) / 2, "least": min(values)}
    return found


def worker(side, op, run):
    run, module = json.loads(run), importlib.import_module(SIDES[side])
    memory.report(getattr(module, op)(*arrays_of(run), run), module)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small width, which says nothing about speed")
    parser.add_argument("--ranks", nargs="+", type=int, help="ranks (default: 8 64 384; 4 with --quick)")
    parser.add_argument("--rounds", type=int, default=11, help="at least 2, for the noise (default: 11)")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/adapters_<device>.json beside this)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(*args.worker)  # imports one of the sides only
    if args.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {args.rounds}")

    sides = {name: importlib.import_module(module) for name, module in SIDES.items()}
    import jax
    import peft
    import timing
    import torch

    if timing.on_accelerator() != torch.cuda.is_available():
        raise SystemExit("One side has a GPU and the other has none; hide it from both, or install both for it.")
    begun = time.perf_counter()
    run = settings(args.quick, timing.on_accelerator())
    versions = {"jax": jax.__version__, "torch": torch.__version__, "peft": peft.__version__}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{timing.device_name()}, {named}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(f"Load average: {load}; times mean little if it is more than a few")
    rate = timing.matmul_rate(run["dtype"], rounds=15)
    print(f"{LAYERS} layers of width {run['width']}, {run['tokens']} tokens, {run['dtype']}")
    report = {"device": timing.device_name(), **versions, "rounds": args.rounds, "load": load}
    report |= {"matmul_flops_per_second": rate, "settings": run, "rows": []}
    for rank in args.ranks or ([4] if args.quick else [8, 64, 384]):
        for op in OPS:
            calls, errors = {}, {}
            for method in METHODS:
                own = {**run, "rank": rank, "method": method}
                arrays = arrays_of(own)
                pair = {name: getattr(side, op)(*arrays, own) for name, side in sides.items()}
                errors[method] = check(op, pair, sides, run["dtype"] == "bfloat16")
                calls |= {(method, name): call for name, call in pair.items()}
            seconds = in_turns(calls, args.rounds)
            del calls, pair
            rows = {}
            for method in METHODS:
                own = {**run, "rank": rank, "method": method}
                ours, theirs = (seconds[method, name] for name in SIDES)
                rows[method] = {
                    "op": op,
                    "method": method,
                    "rank": rank,
                    "error": errors[method],
                    "seconds": {"subspace_jax": ours, "peft": theirs},
                    "speed_up": theirs["median"] / ours["median"],
                    "speed_up_at_most": theirs["median"] * rate / flops(op, own),
                    "over_lora": {
                        name: seconds[method, name]["median"] / seconds["lora", name]["median"] for name in SIDES
                    },
                    "memory": {name: memory.in_own_process(__file__, name, op, json.dumps(own)) for name in SIDES},
                }
                show(rows[method])
            report["rows"] += rows.values()
    name = f"adapters_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - begun:.0f} s")


def show(row):
    for name, time_of in row["seconds"].items():
        peak, later = ("-" if x is None else f"{x / 1e6:.0f} MB" for x in row["memory"][name].values())
        print(
            f"  r {row['rank']:<4} {row['op']:<9} {row['method']:<5} {name:<13} {1e3 * time_of['median']:>8.1f} ms "
            f"+- {1e3 * time_of['noise']:.1f}  over LoRA {row['over_lora'][name]:.2f}  peak {peak}, later {later}"
        )
    print(
        f"  r {row['rank']:<4} {row['op']:<9} {row['method']:<5} speed-up {row['speed_up']:.2f}, "
        f"at most {row['speed_up_at_most']:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
