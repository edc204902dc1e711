"""Fine-tunes the tiny language model by every variant of configs/optim/tiny_e2e.py, at three learning rates each.

    make tiny-lm
    python scripts/bench/tiny_e2e.py --model work/tiny/model

For each variant the least validation loss decides; the table that is printed holds these.
"""

import argparse
import json
import runpy
import tempfile
import time
from pathlib import Path

from subspace_jax import train

CONFIG = Path(__file__).parents[2] / "configs" / "optim" / "tiny_e2e.py"
RESULTS = Path(__file__).parent / "results"


def run(variant: str, rate: float, args: argparse.Namespace) -> dict:
    config = train.load_config(f"{CONFIG}:{variant}")
    config.model.folder, config.optim.learning_rate = str(args.model), rate
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = args.steps
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
        loss = float(train.run(config, workdir, progress=False).metrics["loss"])
    return {"variant": variant, "learning_rate": rate, "loss": loss, "seconds": time.perf_counter() - start}


def main(argv=None):
    rates = runpy.run_path(str(CONFIG))["RATES"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=tuple(rates), default=tuple(rates))
    parser.add_argument("--output", type=Path, default=RESULTS / "tiny_e2e.json")
    args = parser.parse_args(argv)
    rows = []
    for variant in args.only:
        rows += [run(variant, rate, args) for rate in rates[variant]]
        for row in rows[-len(rates[variant]) :]:
            print(
                f"  {variant:<22} {row['learning_rate']:8.0e}  loss {row['loss']:.4f}  {row['seconds']:.0f} s",
                flush=True,
            )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=2) + "\n")
    best = [min((r for r in rows if r["variant"] == v), key=lambda r: r["loss"]) for v in args.only]
    print("| Optimizer | learning rate | loss |\n| --- | --- | --- |")
    for row in sorted(best, key=lambda r: r["loss"]):
        print(f"| `{row['variant']}` | {row['learning_rate']:.0e} | {row['loss']:.3f} |")


if __name__ == "__main__":
    main()
