"""Times a training step of a sparse autoencoder beside a plain PyTorch one, in one run.

    python scripts/bench/sae.py            # some minutes on two cores
    python scripts/bench/sae.py --quick    # small sizes, to see that all runs

TopK, float32, Adam; a batch of 1,024 activations of growing width d, 8 d features, 32 of them active:

  linear   dictionary ``[m, d]``
  polysae  polynomial decoder of ranks (d, d / 8, d / 8), with the retraction of U by QR

Both sides begin with the same parameters, and take one step on the same batch first: losses are compared, and the run
ends where they differ.  The PyTorch step makes the dense code and multiplies it, as the usual trainers do, and retracts
by ``torch.linalg.qr`` with signs.  ``step_dense`` is ours with a dense code (``BatchTopK`` of as many entries).

  ratio  seconds of a side divided by those of subspace_jax; medians over rounds in which all take turns
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

from subspace_jax.interpret import polysae
from subspace_jax.interpret.polysae import core

BATCH, K, RATE = 1024, 32, 1e-3
SIZES, QUICK = (128, 256, 512), (32,)


def config_of(decoder, d, sparsifier="topk"):
    return polysae.PolySAEConfig(
        d, 8 * d, K, (d, d // 8, d // 8), decoder="linear" if decoder == "linear" else "shared", sparsifier=sparsifier
    )


def ours(config, params, x):
    tx = optax.adam(RATE)

    def step(params, opt_state, state, x):
        loss = lambda params: polysae.poly_sae_loss(config, params, x, state)  # noqa: E731
        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state)
        params = core.retract(config, optax.apply_updates(params, updates))
        return params, opt_state, core.next_state(state, parts._replace(codes=None)), value

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    carry = [jax.tree.map(jnp.copy, params), tx.init(params), core.init_state(config)]
    first = []

    def call():
        *carry[:], value = step(*carry, x)
        if not first:
            first.append(float(value))
        return value

    return call, first


def pytorch(decoder, d, params, x):
    import torch

    own = {n: torch.tensor(np.asarray(v)).requires_grad_() for n, v in params.items()}
    x, optimizer = torch.tensor(np.asarray(x)), torch.optim.Adam(list(own.values()), lr=RATE)
    first = []

    def decoded(z):
        if decoder == "linear":
            return z @ own["W_dec"] + own["b_dec"]
        a = z @ own["U"]
        out = a @ own["C1"].T + own["b_dec"]
        for power in (2, 3):
            c = own[f"C{power}"]
            out = out + own[f"lambda{power}"] * (a[:, : c.shape[1]] ** power) @ c.T
        return out

    def call():
        pre = (x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]
        values, indices = torch.topk(pre, K, dim=1)
        z = torch.zeros_like(pre).scatter(1, indices, torch.relu(values))
        loss = (decoded(z) - x).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if "U" in own:
            with torch.no_grad():
                q, r = torch.linalg.qr(own["U"])
                own["U"].copy_(q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0))
        if not first:
            first.append(loss.item())
        return loss

    return call, first


def rows(quick, rounds):
    """Rows of the table: a decoder and a width each."""
    found = []
    for decoder in ("linear", "polysae"):
        for d in QUICK if quick else SIZES:
            config = config_of(decoder, d)
            params = polysae.init_params(jax.random.key(0), config)
            x = jax.random.normal(jax.random.key(1), (BATCH, d))
            made = {"subspace_jax": ours(config, params, x)}
            made["step_dense"] = ours(config_of(decoder, d, "batchtopk"), params, x)
            made["pytorch"] = pytorch(decoder, d, params, x)
            seconds = timing.in_turns({name: call for name, (call, _) in made.items()}, rounds)
            losses = {name: first[0] for name, (_, first) in made.items()}
            if abs(losses["pytorch"] / losses["subspace_jax"] - 1) > 1e-4:
                raise SystemExit(f"{decoder}, d {d}: losses of the first step differ: {losses}")
            row = {"decoder": decoder, "d": d, "m": 8 * d, "seconds": seconds}
            row["ratio"] = {name: t / seconds["subspace_jax"] for name, t in seconds.items()}
            # Encoder and dense decoder, forward and twice backward.
            row["matmul_flops"] = 6 * BATCH * d * 8 * d * 2
            found.append(row)
            for name, t in seconds.items():
                print(
                    f"  {decoder:<8} d {d:>5}  {name:<13} {1e3 * t:>9.1f} ms  ratio {row['ratio'][name]:.2f}",
                    flush=True,
                )
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/sae_<device>.json beside this)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, {args.rounds} rounds")
    label = f"sae_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / label
    report = {"device": timing.device_name(), "jax": jax.__version__, "rounds": args.rounds, "quick": args.quick}
    report["steps"] = rows(args.quick, args.rounds)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
