"""Compares projections of an update at five fractions with an SVD for each, as published scripts do, in one run.

    python scripts/bench/project_update.py           # matrices up to 1024 x 4096, some minutes on two cores
    python scripts/bench/project_update.py --quick   # a small one, to see that all runs

Both sides make the same ten matrices, of "same" and "orth" at each fraction, and are first compared.  All is float32.

  ms      for one weight; medians over rounds in which the sides take turns: read the ratio
  ratio   time of NumPy with an SVD for each fraction divided by that of subspace_jax
  peak    most resident memory of a process that runs `subspace-jax project-update` on three folders of bfloat16 weights
          of this shape, over the size of one of them in float32; libraries and compiling are subtracted
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import timing

from subspace_jax import interop
from subspace_jax.interpret import safety_subspaces as ss

FRACS = (0.01, 0.25, 0.5, 0.75, 0.99)
SHAPES = ((256, 1024), (512, 2048), (1024, 4096))
ALLOWED = 1e-3
# Of this process alone: what getrusage tells includes the parent's at the time of the fork.
_PEAK = """
import sys
from subspace_jax.cli.main import main
if main(sys.argv[1:]):
    sys.exit(2)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def ours(weights):
    modes = ss.task_modes(*({"w": x} for x in weights), side="input")
    return [modes.project(frac, method)[0]["w"] for frac in FRACS for method in ("same", "orth")]


def theirs(weights):
    base, aligned, tuned = weights
    made = []
    for frac in FRACS:
        left = np.linalg.svd(aligned - base, full_matrices=False)[0]
        left = left[:, : max(1, round(frac * left.shape[1]))]
        inside = left @ (left.T @ (tuned - aligned))
        made += [aligned + inside, tuned - inside]
    return made


def peak_of(shape, count):
    """Peak of the command on folders of so many weights of a shape."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        arguments = ["--out", str(folder / "out"), "--frac", "0.25", "--quiet"]
        for name in ("base", "aligned", "tuned"):
            (folder / name).mkdir()
            shapes = {f"layers.{i}.w": (shape, np.dtype(ml_dtypes.bfloat16)) for i in range(count)}
            tensors = (rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for _ in shapes)
            interop.write_safetensors(folder / name / "model.safetensors", shapes, tensors)
            arguments += [f"--{name}", str(folder / name)]
        command = [sys.executable, "-c", _PEAK, "project-update", *arguments]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return 1024 * int(told.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small matrix, which says nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file (default: results/project_update_cpu.json)")
    args = parser.parse_args(argv)
    shapes = ((32, 64),) if args.quick else SHAPES
    floor, rows = peak_of((8, 16), 1), []
    for shape in shapes:
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal(shape, np.float32) for _ in range(3)]
        on_device = [jnp.asarray(x) for x in weights]
        error = max(
            float(np.max(np.abs(np.asarray(a) - b))) for a, b in zip(ours(on_device), theirs(weights), strict=True)
        )
        if not error <= ALLOWED:
            raise SystemExit(f"the sides differ by {error:.1e} at {shape}")
        calls = {"subspace_jax": lambda w=on_device: ours(w), "numpy": lambda w=weights: theirs(w)}
        seconds = timing.in_turns(calls, args.rounds)
        size = 4 * shape[0] * shape[1]
        peaks = {count: (peak_of(shape, count) - floor) / size for count in (1, 4)}
        rows.append(
            {
                "shape": shape,
                "seconds": seconds,
                "ratio": seconds["numpy"] / seconds["subspace_jax"],
                "error": error,
                "peak_over_weight": peaks,
            }
        )
        print(
            f"{shape[0]:>5} x {shape[1]:<5}  {1e3 * seconds['subspace_jax']:8.0f} ms  ratio {rows[-1]['ratio']:5.2f}  "
            f"peak {peaks[1]:5.1f} weights, {peaks[4]:5.1f} with four of them",
            flush=True,
        )
    here = pathlib.Path(__file__).parent
    file = args.output or here / "results" / f"project_update_{jax.devices()[0].platform}.json"
    if not args.quick or args.output:
        file.write_text(json.dumps({"fracs": FRACS, "rows": rows}, indent=2) + "\n")
        print(f"Wrote {file}")


if __name__ == "__main__":
    main()
