"""Times one optimizer step over Grassmann class subspaces, beside its peers, in one run.

    python scripts/bench/grassmann.py                   # the whole table, some minutes on two cores
    python scripts/bench/grassmann.py --sizes 1000x2048x8 --rounds 9
    make bench

Each row steps C subspaces of dimension k in R^n: momentum, tangent projection, geodesic, re-orthonormalisation every
fifth step.  Peers that are not installed are left out (`pip install -e ".[bench]"` brings them):

  subspace_jax   riemannian_sgd, jitted, state and parameters donated
  torch_svd      the published update with a batched thin SVD and QR (arXiv 2308.01547), in PyTorch
  geoopt         RiemannianSGD on geoopt's Stiefel manifold: the nearest that it has (no Grassmann, QR retraction)
  jax_svd        the published update written plainly in JAX with jnp.linalg.svd, jitted

Times are of one step: the mean over a whole cycle of five, the one with re-orthonormalisation among them, and the
median over rounds in which all peers take turns, so that what else the machine does meets all alike.  Read them as
ratios.  "MB" is the least that a step can move (read bases, gradient, momentum; write bases, momentum); "share" is
that over what a large copy reaches in the same run, divided by the time.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import optim
from subspace_jax.manifolds import grassmann

RATE, MOMENTUM, REORTH_EVERY = 0.1, 0.9, 5
SIZES = [(c, 2048, 8) for c in (100, 1000, 10_000)] + [(1000, 2048, k) for k in (1, 4, 16, 32)]


def ours(bases, grads):
    tx = optim.riemannian_sgd(RATE, momentum=MOMENTUM, reorth_every=REORTH_EVERY)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _stepper(step, bases, grads, tx.init)


def jax_svd(bases, grads):
    def step(s, state, grad):
        count, m = state
        m = jnp.where(count == 0, grad, MOMENTUM * m + grad)
        g = m - s @ (s.mT @ m)
        u, sigma, rt = jnp.linalg.svd(g, full_matrices=False)
        angle = -RATE * sigma[:, None, :]
        s = ((s @ rt.mT) * jnp.cos(angle) + u * jnp.sin(angle)) @ rt
        s = jax.lax.cond(count % REORTH_EVERY == 0, _positive_qr, lambda s: s, s)
        return s, (count + 1, m)

    return _stepper(step, bases, grads, lambda s: (jnp.zeros((), jnp.int32), jnp.zeros_like(s)))


def _positive_qr(s):
    q, r = jnp.linalg.qr(s)
    return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]


def _stepper(step, bases, grads, init):
    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jnp.array(bases)
    grads, state = jnp.array(grads), jax.jit(init)(params)

    def run():
        nonlocal params, state
        params, state = compiled(params, state, grads)
        jax.block_until_ready(params)

    return run


def torch_svd(bases, grads):
    import torch

    s, grad = torch.from_numpy(bases.copy()), torch.from_numpy(grads)
    m = grad.clone()
    count = 0

    def run():
        nonlocal s, m, count
        with torch.no_grad():
            m.mul_(MOMENTUM).add_(grad)
            g = m - s @ (s.mT @ m)
            u, sigma, rt = torch.linalg.svd(g, full_matrices=False)
            angle = (-RATE * sigma).unsqueeze(1)
            s = ((s @ rt.mT) * torch.cos(angle) + u * torch.sin(angle)) @ rt
            if count % REORTH_EVERY == 0:
                q, r = torch.linalg.qr(s)
                s = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(1)
            count += 1

    return run


def geoopt(bases, grads):
    import geoopt
    import torch

    point = geoopt.ManifoldParameter(torch.from_numpy(bases.copy()), manifold=geoopt.Stiefel(canonical=False))
    point.grad = torch.from_numpy(grads)
    stepper = geoopt.optim.RiemannianSGD([point], lr=RATE, momentum=MOMENTUM, stabilize=REORTH_EVERY)
    return stepper.step


PEERS = {"subspace_jax": ours, "torch_svd": torch_svd, "geoopt": geoopt, "jax_svd": jax_svd}


def measure(size, rounds, peers):
    c, n, k = size
    bases = np.array(grassmann.random_point(jax.random.key(0), n, k, (c,)))
    grads = np.random.default_rng(0).standard_normal(bases.shape, dtype=np.float32) / np.float32(np.sqrt(n * k))
    runs = {}
    for name in peers:
        try:
            runs[name] = PEERS[name](bases, grads)
        except ImportError as missing:
            print(f"  {name} left out: {missing}")
    copy = jax.jit(jnp.negative)
    source = jnp.zeros((64 * 2**20,), jnp.float32)
    runs["copy"] = lambda: jax.block_until_ready(copy(source))
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(REORTH_EVERY):
                run()
            times[name].append((time.perf_counter() - start) / REORTH_EVERY)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = 2 * source.nbytes / medians.pop("copy")
    # Five products with k x k matrices or to them, and the average of the gradients.
    moved, flops = 5 * bases.nbytes, c * n * k * (10 * k + 2)
    return {
        "classes": c,
        "n": n,
        "k": k,
        "seconds": medians,
        "ratio_to_ours": {name: t / medians["subspace_jax"] for name, t in medians.items()},
        "least_bytes": moved,
        "flops": flops,
        "copy_bytes_per_second": bandwidth,
        "share_of_copy_bandwidth": moved / bandwidth / medians["subspace_jax"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", metavar="CxNxK", help="sizes to time (default: the whole table)")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file (default: beside this script, by device)")
    args = parser.parse_args(argv)
    sizes = [tuple(map(int, text.split("x"))) for text in args.sizes] if args.sizes else SIZES
    if "subspace_jax" not in args.peers:
        parser.error("--peers: subspace_jax is what the others are compared with")

    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, float32, {args.rounds} rounds")
    print(f"{'C x n x k':>16} {'MB':>7} {'GFLOP':>7} {'share':>6}  " + "".join(f"{p:>22}" for p in args.peers))
    rows = []
    for size in sizes:
        row = measure(size, args.rounds, args.peers)
        rows.append(row)
        cells = "".join(
            f"{row['seconds'][p] * 1e3:>12.1f} ms {row['ratio_to_ours'][p]:>5.1f}x"
            if p in row["seconds"]
            else f"{'-':>22}"
            for p in args.peers
        )
        print(
            f"{'x'.join(map(str, size)):>16} {row['least_bytes'] / 1e6:>7.0f} {row['flops'] / 1e9:>7.2f} "
            f"{row['share_of_copy_bandwidth']:>6.2f}  {cells}",
            flush=True,
        )
    label = "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / f"grassmann_{label}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "device": f"{device.device_kind} x {jax.device_count()}" if label != "cpu" else f"CPU, {platform.machine()}",
        "jax": jax.__version__,
        "dtype": "float32",
        "rounds": args.rounds,
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
