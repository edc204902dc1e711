"""Times a linear state-space layer as heads, beside SciPy and the scan, in one run.

    python scripts/bench/attention_ssm.py            # some minutes on two cores
    python scripts/bench/attention_ssm.py --quick    # small sizes, to see that all runs

A layer of 16 decays, 32 inputs and 32 outputs, on one sequence of growing length, float32:

  recurrent  ``apply_heads`` by the chunked recurrence
  fft        ``apply_heads`` by FFT
  scan       ``ssm_scan``, token by token
  associative  ``ssm_associative_scan``
  lfilter    SciPy's recursive filter, a call for each decay between the projections (float64, its only precision)
  operators  NumPy's FFT convolution with the operators of all lags ``[n, p, d]``, these made beforehand

Values are compared first.  ``ratio`` is the seconds of a side divided by those of the recurrence; medians over rounds
in which all take turns.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal
import timing

from subspace_jax.interpret import attention_ssm as ops

STATES, WIDTH = 16, 32


def layer():
    rng = np.random.default_rng(0)
    matrices = (
        np.linspace(0.3, 0.99, STATES),
        rng.standard_normal((STATES, WIDTH)),
        rng.standard_normal((WIDTH, STATES)),
    )
    return ops.LinearSSM(*(jnp.asarray(m, jnp.float32) for m in matrices))


def sides(ssm, n):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((n, WIDTH)), jnp.float32)
    bank = ops.heads_from_ssm(ssm, n, basis="modal")
    applied = {mode: jax.jit(lambda b, x, mode=mode: ops.apply_heads(b, x, mode)) for mode in ("recurrent", "fft")}
    scans = {"scan": jax.jit(ops.ssm_scan), "associative": jax.jit(ops.ssm_associative_scan)}
    decays, into, out = (np.asarray(m, np.float64) for m in ssm[:3])
    host, lags = np.asarray(x), np.asarray(ops.lag_operators(ssm, n))
    kernel = np.fft.rfft(lags, 2 * n, axis=0)

    def lfilter():
        drive = host @ into.T
        states = np.stack([scipy.signal.lfilter([1.0], [1.0, -a], u) for a, u in zip(decays, drive.T, strict=True)], 1)
        return states @ out.T

    def operators():
        spectrum = np.einsum("fpd,fd->fp", kernel, np.fft.rfft(host, 2 * n, axis=0))
        return np.fft.irfft(spectrum, 2 * n, axis=0)[:n]

    calls = {mode: lambda f=f: jax.block_until_ready(f(bank, x)) for mode, f in applied.items()}
    calls |= {name: lambda f=f: jax.block_until_ready(f(ssm, x)) for name, f in scans.items()}
    return calls | {"lfilter": lfilter, "operators": operators}


def measure(n, rounds):
    ssm = layer()
    calls = sides(ssm, n)
    values = {name: np.asarray(call()) for name, call in calls.items()}
    scale = np.max(np.abs(values["lfilter"]))
    error = max(float(np.max(np.abs(value - values["lfilter"]))) for value in values.values()) / scale
    if not error <= 1e-4:
        raise SystemExit(f"{n} tokens: the sides differ by {error:.1e}, more than is allowed")
    seconds = timing.in_turns(calls, rounds)
    ratio = {name: t / seconds["recurrent"] for name, t in seconds.items()}
    for name, t in seconds.items():
        print(f"  {n:>6} tokens  {name:<12} {1e3 * t:>9.2f} ms  ratio {ratio[name]:>6.2f}", flush=True)
    return {"tokens": n, "error": error, "seconds": seconds, "ratio": ratio}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/attention_ssm_<device>.json)")
    args = parser.parse_args(argv)
    label = f"attention_ssm_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    lengths = (256, 512) if args.quick else (1024, 4096, 16_384)
    rows = [measure(n, args.rounds) for n in lengths]
    record = {"states": STATES, "width": WIDTH, "device": timing.device_name(), "rows": rows}
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
