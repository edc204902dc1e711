"""The command that merges fine-tuned models of one base."""

import argparse

from subspace_jax.cli import shared

_MERGE_MODELS = """
    subspace-jax merge-models --models A B C --out work/mean                          # the average
    subspace-jax merge-models --method task-arithmetic --base DIR --models A B --lam 0.4 0.3 --out work/sum
    subspace-jax merge-models --method ties --base DIR --models A B C --lam 1 --keep 0.2 --out work/ties
    subspace-jax merge-models --method regmean --models A B --data a.jsonl b.jsonl --out work/regmean
    subspace-jax merge-models --method fisher --models A B --data a.jsonl b.jsonl --out work/fisher

    The folders are Hugging Face models of one architecture with safetensors, the base the model that all were
    fine-tuned from.  The merged folder has the config, tokenizer and dtypes of the base, or of the first model without
    one; merge.json says how far the models moved, and how far they conflict.

    Memory: some million entries of each model and the tensor that is written.  Time: that of reading all files once,
    four times for ties: 20 seconds of a core for ties of two models of 135 million parameters.  regmean and fisher
    need causal language models and text, on which each model is run: --batches batches, for fisher also backward.
    """


def add_commands(commands) -> None:
    """Adds ``merge-models``."""
    summary = "merge fine-tuned models of one base into one: average, task arithmetic, TIES, RegMean, Fisher"
    parser = shared.add_command(commands, "merge-models", summary, _merge_models, _MERGE_MODELS)
    parser.add_argument(
        "--method",
        choices=("average", "task-arithmetic", "ties", "regmean", "fisher"),
        default="average",
        help="rule (default: average)",
    )
    parser.add_argument("--base", default=None, metavar="DIR", help="model that all were fine-tuned from")
    parser.add_argument("--models", required=True, nargs="+", metavar="DIR", help="fine-tuned models")
    parser.add_argument(
        "--lam",
        nargs="+",
        type=float,
        default=[0.3],
        help="coefficient of task vectors: one, or for task-arithmetic one for each model (default: 0.3)",
    )
    parser.add_argument("--keep", type=float, default=0.2, help="share of the entries that ties keeps (default: 0.2)")
    parser.add_argument(
        "--combine", choices=("sum", "mean", "max"), default="sum", help="how ties combines entries (default: sum)"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.95,
        help="factor of correlations between different inputs in regmean, 1 for all of them (default: 0.95)",
    )
    parser.add_argument(
        "--damping",
        type=float,
        default=0.0,
        help="added to the mean square of each input in regmean, in units of their mean (default: 0)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text for regmean and fisher, one for all models or one for each: .jsonl, .parquet, plain text, or "
        "docstrings",
    )
    parser.add_argument("--batches", type=int, default=16, help="most batches of text for each model (default: 16)")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a batch (default: 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens of an example (default: 256)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the choice of text, and of the tokens that fisher draws (default: 0)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the merged model; new or empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _merge_models(args: argparse.Namespace, overrides: list[str]) -> None:
    import contextlib
    import tempfile

    from subspace_jax.merge.subspace_fusion import folders, report
    from subspace_jax.merge.subspace_fusion.settings import MergeSettings

    lam, alpha, damping = tuple(args.lam), args.alpha, args.damping
    settings = MergeSettings(args.method, lam, args.keep, args.combine, alpha=alpha, damping=damping)
    folders.check_folders(args.models, args.out, settings, base=args.base)
    options = {"base": args.base, "progress": not args.quiet}
    with contextlib.ExitStack() as stack:
        if args.method in ("fisher", "regmean"):
            from subspace_jax.merge.subspace_fusion import language_fisher, language_grams, language_text

            text = language_text.MergeText(tuple(args.data), args.batches, args.batch_size, args.length, args.seed)
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{args.method}-"))
            name, write = (
                ("fishers", language_fisher.write_fishers)
                if args.method == "fisher"
                else ("grams", language_grams.write_grams)
            )
            options[name] = write(args.models, place, text, progress=not args.quiet)
        elif args.data:
            raise ValueError(f"--data: is for --method regmean and fisher, got it with {args.method}")
        found = folders.merge_folders(args.models, args.out, settings, **options)
    print(report.text_of(found))
    files = [f"  {folders.REPORT}: norms, cosines and conflicts of the task vectors"] if found.tensors else []
    if found.tensors:
        files.append(f"  {report.draw(found, found.folder).name}: cosines of the task vectors, and norms by layer")
    print("\n".join([f"\nWrote the model to {found.folder}", *files]))
