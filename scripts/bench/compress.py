"""Times sparse coding and dictionary updates beside the tools that people use for them, in one run.

    python scripts/bench/compress.py           # some minutes on two cores
    python scripts/bench/compress.py --quick   # small sizes, to see that all runs

On a busy machine give every side one thread: ``OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false``, without which threads wait for each other.

``omp``   orthogonal matching pursuit from inner products, with the atoms and coefficients that CoSpaDi gives a square
          kernel of that width with 20 % removed, of 128 columns; peer: scikit-learn's ``orthogonal_mp_gram``
``ksvd``  one sweep of K-SVD over all atoms for as many columns as inputs, 8 power iterations; peer: the same in NumPy,
          which gathers the columns that use an atom

  ratio  seconds of the peer divided by those of subspace_jax; medians over rounds in which both take turns
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

COLUMNS = 128
WIDTHS = {"omp": (64, 128, 256, 576), "ksvd": (64, 128, 256)}
QUICK = {"omp": (16,), "ksvd": (16,)}


def problem(op, width):
    """Dictionary, columns and coefficients of a kernel [width, width]."""
    from subspace_jax.compress import cospadi

    rng = np.random.default_rng(0)
    k, s = cospadi.allocate(width, width, 0.2)
    count = COLUMNS if op == "omp" else width
    mixing = rng.standard_normal((width, width)) * np.arange(1, width + 1)[:, None] ** -0.5
    y = mixing.T @ rng.standard_normal((width, count + k))
    dictionary = y[:, :k] / np.linalg.norm(y[:, :k], axis=0)
    coefficients = np.where(rng.random((k, count)) < s / k, rng.standard_normal((k, count)), 0)
    return [x.astype(np.float32) for x in (dictionary, y[:, -count:], coefficients)], s


def ours(op, dictionary, y, coefficients, s):
    import functools

    import jax
    import jax.numpy as jnp

    from subspace_jax import linalg

    if op == "omp":
        run = jax.jit(functools.partial(linalg.omp_gram, sparsity=s, tile=8))
        given = jnp.asarray(dictionary.T @ dictionary), jnp.asarray(dictionary.T @ y)

        def call():
            values, indices = run(*given)
            return linalg.densify(values, indices, len(given[0]))
    else:
        run = jax.jit(linalg.ksvd_update)
        given = jnp.asarray(y), jnp.asarray(dictionary), jnp.asarray(coefficients)

        def call():
            return run(*given)[0]

    return lambda: np.asarray(jax.block_until_ready(call()))


def scikit_learn(op, dictionary, y, coefficients, s):
    from sklearn.linear_model import orthogonal_mp_gram

    atoms_gram, correlations = dictionary.T @ dictionary, dictionary.T @ y
    return lambda: orthogonal_mp_gram(atoms_gram, correlations, n_nonzero_coefs=s)


def numpy_ksvd(op, dictionary, y, coefficients, s):
    def sweep():
        atoms, rows = dictionary.copy(), coefficients.copy()
        residual = y - atoms @ rows
        for i in range(atoms.shape[1]):
            used = np.flatnonzero(rows[i])
            rest = residual[:, used] + np.outer(atoms[:, i], rows[i, used])
            atom = atoms[:, i]
            for _ in range(8):
                right = rest.T @ atom
                atom = rest @ (right / np.linalg.norm(right))
                atom /= np.linalg.norm(atom)
            atoms[:, i], rows[i, used] = atom, rest.T @ atom
            residual[:, used] = rest - np.outer(atom, rows[i, used])
        return atoms

    return sweep


PEERS = {"omp": ("scikit-learn", scikit_learn), "ksvd": ("numpy", numpy_ksvd)}


def measure(widths, rounds):
    """Rows of one operation and width each; the sides are compared first."""
    import timing

    rows = []
    for op, sizes in widths.items():
        for width in sizes:
            arrays, s = problem(op, width)
            peer, make = PEERS[op]
            calls = {"subspace_jax": ours(op, *arrays, s), peer: make(op, *arrays, s)}
            values = {name: call() for name, call in calls.items()}
            # As errors: where two atoms correlate to within rounding, the sides may choose differently.
            error = residual_gap(op, arrays, values, peer)
            if not error <= 1e-2:
                raise SystemExit(f"{op}: the sides differ by {error:.1e}, more than is allowed")
            seconds = timing.in_turns(calls, rounds)
            ratio = seconds[peer] / seconds["subspace_jax"]
            rows.append({"op": op, "width": width, "s": s, "error": error, "seconds": seconds, "ratio": ratio})
            told = ", ".join(f"{name} {t:.4f} s" for name, t in seconds.items())
            print(f"  {op:<5} width {width:>4}, s = {s:>4}: {told}, ratio {ratio:.2f}", flush=True)
    return rows


def residual_gap(op, arrays, values, peer):
    """Relative difference of the sides: of their errors, or of their atoms."""
    dictionary, y, _ = arrays
    if op == "ksvd":
        return float(np.abs(values[peer] - values["subspace_jax"]).max())
    left = {name: np.linalg.norm(y - dictionary @ value) for name, value in values.items()}
    return float(abs(left[peer] - left["subspace_jax"]) / np.linalg.norm(y))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/compress_<device>.json beside this)")
    args = parser.parse_args(argv)
    import jax
    import timing

    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    label = f"compress_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    out = args.output or Path(__file__).parent / "results" / label
    rows = measure(QUICK if args.quick else WIDTHS, args.rounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "rows": rows}
    out.write_text(json.dumps(told, indent=2) + "\n")
    print(f"Wrote {out} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
