"""The command that draws where a network with spatial attention looks."""

import argparse

from subspace_jax.cli import shared

_ATTENTION = """
    subspace-jax attention --workdir work/shapes             # a run of represent/shape_texture
    subspace-jax attention --workdir work/shapes --best --images 32 --out maps.png

    Takes some ten seconds, most of them for opening the run.
    """


def add_commands(commands) -> None:
    """Adds ``attention``."""
    summary = "draw the attention maps of a run of dynamic subspace learners"
    attention = shared.add_command(commands, "attention", summary, _attention, _ATTENTION)
    attention.add_argument("--workdir", required=True, help="folder of the run")
    attention.add_argument("--images", type=int, default=16, help="images of the evaluation set (%(default)s)")
    attention.add_argument("--out", help="the PNG to write (default: attention.png in the workdir)")
    shared.add_checkpoint(attention)


def _attention(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.represent import dynamic_subspace_learners as learners

    step = "best" if args.best else args.step
    path = learners.draw_run(args.workdir, args.out, num_images=args.images, step=step)
    print(f"Wrote {path}")
