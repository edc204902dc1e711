"""The command for factors of images."""

import argparse
import os

from subspace_jax.cli import shared

_FACTORS = """
    subspace-jax factors --workdir work/sprites                     # swaps.png and generated.png, all factors
    subspace-jax factors --workdir work/openmoji --swap tone --out work/tone.png
    subspace-jax factors --workdir work/openmoji --generate tone=dark --generate gender=woman --out work/dark.png

    Takes a quarter of a minute on one core for the sprites.
    """


def add_commands(commands) -> None:
    """Adds ``factors``."""
    summary = "draw images of an XFactors run with factors swapped, or with given values"
    factors = shared.add_command(commands, "factors", summary, _factors, _FACTORS)
    factors.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    what = factors.add_mutually_exclusive_group()
    what.add_argument(
        "--swap", action="append", default=[], metavar="FACTOR", help='a factor to swap; "rest": what is not labelled'
    )
    what.add_argument(
        "--generate", action="append", default=[], metavar="FACTOR=VALUE", help="a value that images are given"
    )
    factors.add_argument("--out", metavar="FILE.png", help="file to write (default: in the folder of the run)")
    factors.add_argument("--rows", type=int, default=5, help="images that are changed")
    factors.add_argument("--seed", type=int, default=0, help="seed of the images")
    shared.add_checkpoint(factors)


def _factors(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.represent import xfactors

    if args.out and not (args.swap or args.generate):
        raise ValueError("--out: expected --swap or --generate beside it, as there are two pictures without them")
    chosen = {}
    for text in args.generate:
        name, _, value = text.partition("=")
        if not value:
            raise ValueError(f"--generate: expected FACTOR=VALUE, got {text}")
        chosen.setdefault(name, []).append(value)
    trained = xfactors.open_trained(args.workdir, step="best" if args.best else args.step)
    options = {"rows": args.rows, "seed": args.seed}
    written = []
    if not args.generate:
        written.append(args.out or os.path.join(args.workdir, "swaps.png"))
        xfactors.draw_swaps(trained, written[-1], factors=args.swap, **options)
    if not args.swap:
        written.append(args.out or os.path.join(args.workdir, "generated.png"))
        xfactors.draw_generated(trained, written[-1], chosen=chosen, **options)
    print(f"Wrote {' and '.join(map(os.path.abspath, written))}")
