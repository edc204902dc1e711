"""The command that merges several adapters into one."""

import argparse
import os

from subspace_jax.cli import shared

_MERGE_ADAPTERS = """
    subspace-jax merge-adapters --adapters work/a/adapter work/b/adapter --out work/merged
    subspace-jax merge-adapters --adapters a b c --weights 1 0.5 -0.3 --rank 32 --base work/models/smollm2 \\
        --out work/merged
    subspace-jax merge-adapters --adapters a b c --method ties --keep 0.2 --rank 64 --out work/ties
    subspace-jax merge-adapters --adapters work/dora/adapter --plain --rank 64 --out work/lora    # DoRA as LoRA

    Adapters are PEFT folders of one model, LoRA or DoRA, and runs of `subspace-jax finetune`, also those of SVFit and
    FLoRA.  Ranks, scales and adapted layers may differ.  The weighted sum is computed from the factors and is exact
    where --rank is not below the sum of the ranks; otherwise it is the best approximation, whose error is told.  With
    a DoRA among them the result is DoRA, also exactly; it reads the model's weights.

    TIES has no such form: it takes each layer's updates as dense matrices, one layer at a time, with a threshold for
    each matrix.  What comes out has full rank, so expect a large error, which is told.

    Time: half a minute on one core for three adapters of SmolLM2-135M, of rank 16 on all linear layers; TIES takes
    longer, and more memory.
    """


def add_commands(commands) -> None:
    """Adds ``merge-adapters``."""
    summary = "merge several adapters of a language model into one for PEFT, without its weights"
    parser = shared.add_command(commands, "merge-adapters", summary, _merge_adapters, _MERGE_ADAPTERS)
    parser.add_argument("--adapters", required=True, nargs="+", metavar="DIR", help="PEFT folders, or folders of runs")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="a number for each (default: 1/N, the average)"
    )
    parser.add_argument(
        "--method",
        choices=("linear", "ties"),
        default="linear",
        help="the weighted sum of the updates, or that of what TIES keeps of them (default: linear)",
    )
    parser.add_argument("--rank", type=int, help="largest rank of the result (default: the sum of the ranks)")
    parser.add_argument("--keep", type=float, default=0.2, help="share of entries that TIES keeps (default: 0.2)")
    parser.add_argument("--plain", action="store_true", help="write LoRA, an approximation, where adapters are DoRA")
    parser.add_argument(
        "--base", metavar="DIR", help="Hugging Face folder or GGUF file of the model (default: what the adapters name)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="PEFT folder to write; new or empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    shared.add_trust(parser)


def _merge_adapters(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.merge import adapter_folders, adapter_report
    from subspace_jax.merge.adapters import AdapterMerge

    report = adapter_folders.merge_adapter_folders(
        args.adapters,
        args.out,
        args.weights,
        AdapterMerge(args.method, args.rank, args.keep, args.plain),
        base=args.base,
        progress=not args.quiet,
        trust_remote_code=args.trust_remote_code,
    )
    added = " + ".join(f"{w:g} {name}" for name, w in zip(report.adapters, report.weights, strict=True))
    print(f"{report.method}: {added}\n\n{adapter_report.text_of(report)}")
    print(f"\nWrote the adapter to {os.path.abspath(args.out)}, merge_report.json and merge_report.png beside it")
