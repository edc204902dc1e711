"""The command that compresses a language model."""

import argparse
import os

from subspace_jax.cli import shared

_COMPRESS = """
    subspace-jax compress --model work/models/smollm2 --ratio 0.2 --calibration docstrings --out work/small
    subspace-jax perplexity --model work/small --data docstrings        # generate, accuracy and finetune take it too
    subspace-jax compress --model DIR --method svd-llm --ratio 0.2 --calibration my.jsonl --out work/low_rank
    subspace-jax compress --model DIR --method basis-sharing --share 2 --calibration my.jsonl --out work/shared
    subspace-jax compress --model DIR --ratio 0.2 --ratio-of mlp/down=0.1 --ratio-of 'layers/[0-3]/=0.05' \\
        --calibration my.jsonl --out work/by_rule --dense    # a Hugging Face folder, of the size of the model

    Calibrating SmolLM2-135M takes a minute of one core.  By the time of single kernels, a round of cospadi then takes
    ten, two kernels at a time on two cores.  A command that was stopped goes on where it was.
    """


def add_commands(commands) -> None:
    """Adds ``compress``."""
    summary = "make a language model's linear layers smaller, after training and without gradients"
    parser = shared.add_command(commands, "compress", summary, _compress, _COMPRESS)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder, or GGUF file")
    parser.add_argument(
        "--tokenizer", default="", help="file, folder or 'bytes' (default: that of the model, or bytes)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--method",
        default="cospadi",
        choices=("cospadi", "svd-llm", "asvd", "svd", "basis-sharing"),
        help="dictionary and sparse coefficients, or a low rank by one of four criteria (default: cospadi)",
    )
    parser.add_argument("--ratio", type=float, default=0.2, help="share of each kernel that is removed (default: 0.2)")
    parser.add_argument(
        "--ratio-of",
        action="append",
        default=[],
        metavar="REGEX=RATIO",
        help="another ratio for kernels in whose name, such as layers/3/mlp/down, this is found; 0 keeps one",
    )
    parser.add_argument(
        "--share", type=int, default=1, help="consecutive layers with one dictionary or basis (default: 1)"
    )
    text = parser.add_argument_group("calibration text")
    text.add_argument("--calibration", required=True, help="docstrings, a .jsonl, .parquet or text file, or a TFDS set")
    text.add_argument("--split", default="train")
    text.add_argument("--rows", type=int, default=64, help="rows of text, drawn by --seed (default: 64)")
    text.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    text.add_argument("--batch-size", type=int, default=8, help="rows of a batch (default: 8)")
    learning = parser.add_argument_group("cospadi")
    learning.add_argument("--rounds", type=int, default=4, help="rounds of coding and update (default: 4; paper: 60)")
    learning.add_argument("--solver", default="power", choices=("power", "svd", "mod"), help="update (default: power)")
    learning.add_argument(
        "--init", default="svd", choices=("svd", "data"), help="singular vectors, or random columns (default: svd)"
    )
    learning.add_argument("--tol", type=float, default=0.0, help="share by which a round has to improve (default: 0)")
    parser.add_argument("--dense", action="store_true", help="write a Hugging Face folder with dense kernels")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _compress(args: argparse.Namespace, overrides: list[str]) -> None:
    from pathlib import Path

    import numpy as np

    from subspace_jax import language
    from subspace_jax.cli import language as models
    from subspace_jax.compress import cospadi
    from subspace_jax.data import text

    rules = dict(_rule(item) for item in args.ratio_of)
    for name, least in (("rows", 1), ("length", 2), ("batch_size", 1), ("rounds", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise ValueError(f"--out: expected another folder than the model's, got {args.out}")
    config, model, tokenizer = models.open_model(args)
    cospadi.plan_units(model, args.method, args.ratio, rules, args.share)
    config.data.source, config.data.train_split = args.calibration, args.split
    rows = text.pack_rows(language.texts_of(config, "train", tokenizer), tokenizer, min(args.length, model.max_length))
    count = len(rows["inputs"])
    chosen = np.sort(np.random.default_rng(args.seed).permutation(count)[: args.rows])
    rows = {name: column[chosen] for name, column in rows.items()}
    learning = cospadi.Learning(args.rounds, args.solver, args.init, args.tol, args.seed)
    settings = cospadi.CompressSettings(args.method, args.ratio, rules, args.share, learning, args.batch_size)
    report = cospadi.compress_folder(args.model, args.out, rows, settings, dense=args.dense, progress=not args.quiet)
    cospadi.write_report(Path(args.out), report, {"method": args.method, "ratio": args.ratio, "seed": args.seed})
    print(cospadi.summary_text(report))
    what = "dense Hugging Face folder" if args.dense else "compressed model"
    print(f"Wrote the {what} to {os.path.abspath(args.out)}, result.json and errors.png beside it")


def _rule(text: str) -> tuple[str, float]:
    rule, _, ratio = text.rpartition("=")
    try:
        return rule, float(ratio)
    except ValueError as error:
        raise ValueError(f"--ratio-of: expected REGEX=RATIO, got {text}") from error
