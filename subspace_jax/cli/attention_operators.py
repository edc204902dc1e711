"""The command that measures the attention layers of a language model as heads with operators."""

import argparse
import logging

from subspace_jax.cli import language, shared

log = logging.getLogger(__name__)

_ATTENTION_OPERATORS = """
    subspace-jax attention-operators --model work/models/smollm2 --out work/operators   # docstrings; a minute
    subspace-jax attention-operators --model DIR --data some.txt --length 512 --rows 2 --out work/operators
    subspace-jax attention-operators --model DIR --adapter work/run/adapter --out work/tuned

    A layer is y_i = sum_h sum_j a_h(i, j) V_h x_j.  For each layer: the interaction rank, which is the dimension of the
    operators that it uses and at most the number of heads; the error that the best half of the heads leaves; the mean
    distance of attention, and its weight on the first token; and how the gradient of the last output by the inputs
    falls with distance.
    """


def add_commands(commands) -> None:
    """Adds ``attention-operators``."""
    summary = "measure how many heads the attention layers of a language model use, and how far their gradients travel"
    parser = shared.add_command(commands, "attention-operators", summary, _operators, _ATTENTION_OPERATORS)
    language.add_model(parser)
    parser.add_argument(
        "--data",
        default="docstrings",
        help="docstrings (the default), a .jsonl, .parquet or text file, or a TFDS set (its split below)",
    )
    parser.add_argument("--split", default="validation")
    language.add_chat_template(parser)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: 128)")
    parser.add_argument("--rows", type=int, default=4, help="rows that are read (default: 4)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for JSON and picture")
    parser.add_argument("--seed", type=int, default=0, help="which texts are read")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _operators(args: argparse.Namespace, overrides: list[str]) -> None:
    import jax.numpy as jnp

    from subspace_jax import language as models
    from subspace_jax import train
    from subspace_jax.interpret.attention_ssm import language_model, report

    if args.length < 4 or args.rows < 1:
        raise ValueError(f"--length, --rows: expected at least 4 and 1, got {args.length} and {args.rows}")
    config, model, tokenizer = language.open_model(args)
    if args.length > model.max_length:
        raise ValueError(f"--length: expected at most {model.max_length}, the model's, got {args.length}")
    tokens = _rows(args, config, tokenizer)
    out = train.writable_folder(args.out)
    model, params = models.load_adapted(args.model, args.adapter)
    layers = language_model.measure_layers(model, params, jnp.asarray(tokens), progress=not args.quiet)
    print(report.layers_table(layers), flush=True)
    names = ("model", "adapter", "data", "split", "seed")
    about = {name: getattr(args, name) for name in names} | {"rows": len(tokens), "length": args.length}
    written = [report.write_record(out, layers, about), report.draw(out, layers)]
    shared.write_result(out, report.summary(layers))
    print(f"Wrote {', '.join(path.name for path in written)} and result.json to {out}")


def _rows(args: argparse.Namespace, config, tokenizer):
    """Returns rows of tokens, ``[rows, length]``, of texts in a random order, one after another."""
    import numpy as np

    from subspace_jax import language as models
    from subspace_jax.data import text

    config.data.source, config.data.train_split = args.data, args.split
    config.data.chat_template = args.chat_template
    texts = models.texts_of(config, "train", tokenizer)
    tokens = []
    for i in np.random.default_rng(args.seed).permutation(len(texts)):
        tokens.extend(text.encode(texts[i], tokenizer)[0].tolist())
        if len(tokens) >= args.rows * args.length:
            break
    rows = min(args.rows, len(tokens) // args.length)
    if rows < 1:
        raise ValueError(
            f"--data: {args.data} has {len(tokens)} tokens; expected at least --length, {args.length} of them"
        )
    if rows < args.rows:
        log.warning("%s has tokens for %d rows, fewer than the %d asked for", args.data, rows, args.rows)
    return np.asarray(tokens[: rows * args.length], np.int32).reshape(rows, args.length)
