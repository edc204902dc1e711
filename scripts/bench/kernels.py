"""Checks the ops of subspace_jax.kernels against float64, then times each beside its peers, in one run.

    python scripts/bench/kernels.py                      # sizes for the device at hand, below 8 minutes
    python scripts/bench/kernels.py --ops lora_linear --rounds 9
    python scripts/bench/kernels.py --check-only
    make bench                                           # after scripts/bench/grassmann.py

Every op is first compared with a plain formula in float64, in float32 and bfloat16, at small ragged sizes; the run ends
there if one is off.  Then each case is timed: the op by each implementation that serves the device, the plain formula
jitted ("plain", what XLA makes of it unaided), and peers where they exist and are installed (PEFT's DoRA and PyTorch's
batched SVD through PyTorch, optax.contrib's GaLore).  Times are medians over rounds in which all take turns: read them
as ratios.

  MB, GFLOP   the least that the op moves, and its arithmetic, counted by hand (docs/kernels.md)
  temp        memory that the compiled program takes beside arguments and results
  copy, mm    share of the rate of a large copy, and of a large product in the same dtype, measured in the same run
  ratio       time of each divided by that of the op's first implementation
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
import timing
from kernel_cases import CASES, CHECKS

BUDGET = 450.0  # seconds after which no further case is begun


def check(ops):
    """Compares with float64; returns rows, and raises SystemExit after printing all that are off."""
    rows = []
    for name, dtype, tolerance, got, want in (row for op in ops for row in CHECKS[op]()):
        errors = [_error(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
        rows.append({"check": name, "dtype": dtype, "error": max(errors), "tolerance": tolerance})
        verdict = "ok" if max(errors) <= tolerance else "OFF"
        print(f"  {name:<42} {dtype:<9} error {max(errors):.1e}  allowed {tolerance:.0e}  {verdict}", flush=True)
    off = [f"{r['check']} {r['dtype']}" for r in rows if not r["error"] <= r["tolerance"]]
    if off:
        raise SystemExit(f"Off by more than is allowed: {', '.join(off)}")
    return rows


def _error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def measure(case, rounds, copy_rate, matmul_rates):
    """Times one case; returns the row of the report."""
    calls, temporaries = {}, {}
    for name, make in case.calls.items():
        try:
            calls[name], temporaries[name] = make()
        except ImportError as missing:
            print(f"    {name} left out: {missing}")
    seconds = timing.in_turns(calls, rounds)
    first = next(iter(seconds))
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "least_bytes": case.least_bytes,
        "flops": case.flops,
        "seconds": seconds,
        "temporary_bytes": temporaries,
        "share_of_copy": {n: case.least_bytes / copy_rate / t for n, t in seconds.items()},
        "share_of_matmul": {n: case.flops / matmul_rates[case.dtype] / t for n, t in seconds.items()},
        "ratio": {n: t / seconds[first] for n, t in seconds.items()},
    }


def show(row):
    print(
        f"{row['op']}  {row['shape']}  {row['dtype']}  "
        f"{row['least_bytes'] / 1e6:.1f} MB  {row['flops'] / 1e9:.2f} GFLOP"
    )
    for name, seconds in row["seconds"].items():
        temporary = row["temporary_bytes"][name]
        held = "        -" if temporary is None else f"{temporary / 1e6:>6.1f} MB"
        print(
            f"    {name:<22} {seconds * 1e3:>10.3f} ms  temp {held}  copy {row['share_of_copy'][name]:>5.2f}"
            f"  mm {row['share_of_matmul'][name]:>5.2f}  ratio {row['ratio'][name]:>6.2f}",
            flush=True,
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES), help="ops to run (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/<device>.json beside this script)")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "checks": check(args.ops)}
    if args.check_only:
        return
    copy_rate = timing.copy_rate()
    matmul_rates = {dtype: timing.matmul_rate(dtype) for dtype in ("float32", "bfloat16")}
    rates = ", ".join(f"{dtype} product {rate / 1e12:.2f} TFLOP/s" for dtype, rate in matmul_rates.items())
    print(f"copy {copy_rate / 1e9:.1f} GB/s, {rates}")
    report |= {"copy_bytes_per_second": copy_rate, "matmul_flops_per_second": matmul_rates, "rows": []}
    for make in (make for op in args.ops for make in CASES[op](timing.on_accelerator())):
        if time.perf_counter() - start > BUDGET:
            print(f"Stopped after {BUDGET:.0f} s; the cases that are left were not timed.")
            break
        row = measure(make(), args.rounds, copy_rate, matmul_rates)
        report["rows"].append(row)
        show(row)
    output = args.output or Path(__file__).parent / "results" / f"{timing.file_label()}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
