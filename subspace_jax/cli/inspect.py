"""The command that says what an update changed in a model."""

import argparse
from pathlib import Path

from subspace_jax.cli import shared

_INSPECT = """
    subspace-jax inspect work/models/smollm2 --adapter work/dora/adapter --out work/inspection
    subspace-jax inspect base tuned --out report.html                          # two folders of one architecture
    subspace-jax inspect base tuned_a tuned_b --adapter lora --out work/three  # and how the updates overlap

    Folders are those of Hugging Face, with safetensors; config.json is not read.  Adapters are LoRA or DoRA in the
    format of PEFT, which `finetune` and `export` write too.

    One weight at a time is in memory.  A billion parameters take some minutes on two cores, a LoRA of SmolLM2's 135
    million half a minute.
    """


def add_commands(commands) -> None:
    """Adds ``inspect``."""
    summary = "say what a fine-tuning or an adapter did to each weight: norms, ranks, directions, intruder dimensions"
    parser = shared.add_command(commands, "inspect", summary, _inspect, _INSPECT)
    parser.add_argument("base", metavar="BASE", help="Hugging Face folder of the model before")
    parser.add_argument("tuned", nargs="*", metavar="TUNED", help="folder of the model after; several are compared")
    parser.add_argument(
        "--adapter", action="append", default=[], dest="adapters", metavar="DIR", help="PEFT folder; may be repeated"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR|FILE.html", help="folder, or page with its .json beside it"
    )
    parser.add_argument(
        "--top", type=int, default=10, help="leading singular vectors that may be intruders (default: 10)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="cosine below which they are (default: 0.5, as in PEFT)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _inspect(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.interop.peft.config import read_fields
    from subspace_jax.interpret import inspector

    for folder in args.adapters:
        read_fields(Path(folder).expanduser())
    sources = [*args.tuned, *args.adapters]
    if not sources:
        raise ValueError("TUNED, --adapter: expected the folder of a tuned model or of an adapter, got none")
    options = {"top": args.top, "threshold": args.threshold, "progress": not args.quiet}
    for folder, argument in ((args.base, "BASE"), *((folder, "TUNED") for folder in args.tuned)):
        shared.check_model_folder(folder, argument)
    page, data = inspector.output_files(args.out)
    found = inspector.inspect_updates(args.base, sources, **options)
    inspector.write_report(found, page, data)
    print(f"{inspector.to_text(found)}\n\nWrote to {page.parent}:")
    print(f"  {page.name}: heat maps, curves and tables, a page of its own\n  {data.name}: all numbers")
