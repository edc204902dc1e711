"""Trains the tiny language model by every variant of configs/optim/tiny_gpt.py, Muon among them, over three seeds.

    python scripts/bench/tiny_gpt.py                          # some hours on two cores; goes on where it was stopped
    python scripts/bench/tiny_gpt.py --only adamw muon        # some
    python scripts/bench/tiny_gpt.py --steps 4 --seeds 0 --output quick.json   # to see that all runs

Prints a table of validation losses, mean and standard deviation over the seeds, beside that of AdamW, and the bytes of
the optimizer's state.  Runs that the output holds already are not repeated.
"""

import argparse
import json
import runpy
import statistics
import tempfile
import time
from pathlib import Path

import jax

from subspace_jax import train

CONFIG = Path(__file__).parents[2] / "configs" / "optim" / "tiny_gpt.py"
RESULTS = Path(__file__).parent / "results"


def run(variant: str, seed: int, steps: int) -> dict:
    config = train.load_config(f"{CONFIG}:{variant}")
    config.seed = seed
    if steps != config.train.steps:
        config.train.steps = config.train.eval_every = config.train.checkpoint_every = steps
        config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 2)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
        result = train.run(config, workdir, progress=False)
    state = sum(x.nbytes for x in jax.tree.leaves(result.state.opt_state))
    row = {"variant": variant, "seed": seed, "steps": steps, "loss": float(result.metrics["loss"])}
    return row | {"state_bytes": state, "seconds": time.perf_counter() - start}


def table(rows: list[dict]) -> str:
    """The variants that were run, the best first."""
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    means = {name: statistics.mean(row["loss"] for row in found) for name, found in by_variant.items()}
    lines = ["| Optimizer | loss, mean of the seeds | over AdamW | state |", "| --- | --- | --- | --- |"]
    for name in sorted(means, key=means.get):
        losses = [row["loss"] for row in by_variant[name]]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        over = f"{100 * (means[name] / means['adamw'] - 1):.1f} %" if "adamw" in means and name != "adamw" else ""
        state = by_variant[name][0]["state_bytes"] / 1e6
        lines.append(f"| `{name}` | {means[name]:.3f}{spread} | {over} | {state:.1f} MB |")
    return "\n".join(lines)


def main(argv=None):
    variants = runpy.run_path(str(CONFIG))["VARIANTS"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=variants, default=variants, help="variants (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=RESULTS / "tiny_gpt.json")
    args = parser.parse_args(argv)
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []
    done = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    for seed in args.seeds:
        for variant in args.only:
            if (variant, seed, args.steps) in done:
                continue
            rows.append(run(variant, seed, args.steps))
            print(f"  {variant:<26} seed {seed}  loss {rows[-1]['loss']:.4f}  {rows[-1]['seconds']:.0f} s", flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(table([row for row in rows if row["steps"] == args.steps and row["variant"] in args.only]))


if __name__ == "__main__":
    main()
