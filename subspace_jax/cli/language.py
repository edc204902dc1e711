"""The commands that read a language model from a Hugging Face folder and train nothing."""

import argparse
import logging

from subspace_jax.cli import shared

log = logging.getLogger(__name__)

_GENERATE = """
    subspace-jax generate --model work/tiny/model --prompt "Return the" --max-new-tokens 64
    subspace-jax generate --model DIR --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
    subspace-jax generate --model work/tiny/model --adapter work/dora/adapter --prompt "Return the"
    """
_PERPLEXITY = """
    subspace-jax perplexity --model work/tiny/model --data docstrings
    subspace-jax perplexity --model DIR --data some.jsonl --length 512
    """
_ACCURACY = """
    subspace-jax accuracy --model DIR --data ai2_arc/ARC-Easy --split test
    subspace-jax accuracy --model DIR --data glue/sst2 --by-token
    """


def add_commands(commands) -> None:
    """Adds ``generate``, ``perplexity`` and ``accuracy``."""
    generate = shared.add_command(commands, "generate", "continue a prompt", _generate, _GENERATE)
    _add_model(generate)
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        help="upper limit; the model's end-of-sequence tokens stop earlier (default: 64)",
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy decoding (default); else at least 1e-6"
    )
    generate.add_argument("--top-p", type=float, default=1.0, help="probability mass to sample from (default: 1)")
    generate.add_argument("--seed", type=int, default=0)

    perplexity = shared.add_command(commands, "perplexity", "measure a model on text", _perplexity, _PERPLEXITY)
    _add_model(perplexity)
    perplexity.add_argument(
        "--data", required=True, help="docstrings, a .jsonl, .parquet or text file, or a TFDS set (its split below)"
    )
    perplexity.add_argument("--split", default="validation")
    perplexity.add_argument("--prompt-field", default="", help="field of the prompt, which is not measured")
    perplexity.add_argument("--text-field", default="text", help="field of the text")
    _add_batch(perplexity, "tokens of an example")

    accuracy = shared.add_command(
        commands, "accuracy", "answer questions by the likeliest of their options", _accuracy, _ACCURACY
    )
    _add_model(accuracy)
    accuracy.add_argument("--data", required=True, help="TFDS set with options, such as ai2_arc/ARC-Easy or glue/sst2")
    accuracy.add_argument("--data-dir", default=None, help="folder of prepared sets (default: the usual place)")
    accuracy.add_argument("--split", default="validation")
    _add_batch(accuracy, "tokens of an example, question and option together")
    accuracy.add_argument("--by-token", action="store_true", help="compare the mean over the tokens of an option")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder, or GGUF file")
    parser.add_argument(
        "--tokenizer", default="", help="file, folder or 'bytes' (default: that of the model, or bytes)"
    )
    parser.add_argument("--adapter", default=None, metavar="DIR", help="PEFT folder, LoRA or DoRA (default: none)")


def _add_batch(parser: argparse.ArgumentParser, length: str) -> None:
    parser.add_argument("--length", type=int, default=256, help=f"{length} (default: 256)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a batch (default: 8)")


def _open(args: argparse.Namespace):
    from subspace_jax import language

    config = language.default_config().unlock()
    config.model.folder, config.model.tokenizer = args.model, args.tokenizer or shared.tokenizer_of(args.model)
    model, tokenizer = language.model_of(config)
    if config.model.tokenizer == "bytes" and not args.tokenizer and tokenizer.eos_id not in model.eos_tokens:
        log.warning("%s has no tokenizer: texts are read as bytes, by which it does not seem to be trained", args.model)
    return config, model, tokenizer


def _generate(args: argparse.Namespace, overrides: list[str]) -> None:
    import jax
    import jax.numpy as jnp

    from subspace_jax import language, nn
    from subspace_jax.data import text

    if args.temperature != 0 and not 1e-6 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature: expected 0, or a finite number of at least 1e-6, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p: expected a number in (0, 1], got {args.top_p}")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed: expected a number in [0, 2^32), got {args.seed}")
    _, model, tokenizer = _open(args)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = start + tokenizer.encode(args.prompt)
    if not prompt:
        raise ValueError("--prompt: expected some text, got none")
    if len(prompt) + args.max_new_tokens > model.max_length:
        raise ValueError(
            f"--prompt and --max-new-tokens: {len(prompt)} tokens and max_new_tokens = {args.max_new_tokens} exceed "
            f"the model's {model.max_length} positions"
        )
    if beyond := [token for token in model.eos_tokens if token >= model.vocab_size]:
        log.warning("no text ends with the tokens %s, of which the model has no row", beyond)
    model, params = language.load_adapted(args.model, args.adapter)
    new = nn.generate(
        model,
        params,
        jnp.array([prompt], jnp.int32),
        max_new_tokens=args.max_new_tokens,
        key=jax.random.key(args.seed),
        temperature=args.temperature,
        top_p=args.top_p,
    )
    print(args.prompt + text.decode_continuation(tokenizer, prompt, new.tokens[0, : int(new.lengths[0])]))


def _perplexity(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import data, language, metrics
    from subspace_jax.data import text

    config, model, tokenizer = _open(args)
    config.data.source, config.data.eval_split = args.data, args.split
    config.data.evaluation = "" if args.data == "docstrings" else args.data
    config.data.prompt, config.data.completion = args.prompt_field, args.text_field
    rows = text.pack_rows(language.texts_of(config, "eval"), tokenizer, min(args.length, model.max_length))
    task, params, mesh = _place(args)
    total, count = language.score_rows(task, params, data.eval_batches(rows, batch_size=args.batch_size), mesh)
    print(f"perplexity {float(metrics.perplexity(total, count)):.3f} over {count:.0f} tokens")


def _accuracy(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import data, language, metrics
    from subspace_jax.data import text

    _, model, tokenizer = _open(args)
    questions = text.tfds_texts(args.data, args.split, args.data_dir)
    if not isinstance(questions[0], text.Choice):
        raise ValueError(f"--data: expected a set of questions with options, got {args.data}, which has none")
    rows = text.choice_rows(questions, tokenizer, min(args.length, model.max_length))
    task, params, mesh = _place(args)
    nll, tokens = language.option_scores(task, params, data.eval_batches(rows, batch_size=args.batch_size), mesh)
    counts = {"num_tokens": tokens} if args.by_token else {}
    share = metrics.choice_accuracy(nll, rows["question"], rows["is_answer"], **counts)
    print(f"accuracy {share:.4f} over {len(questions)} questions")


def _place(args: argparse.Namespace):
    """Returns task, parameters spread over all devices, and their mesh."""
    from subspace_jax import language, train

    mesh = train.make_mesh()
    train.check_batch_size(args.batch_size, mesh, name="--batch-size")
    model, params = language.load_adapted(
        args.model, args.adapter, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
    )
    return language.CausalLMTask(model), params, mesh
