"""The commands that measure a language model, and what is common to all that read one and train nothing."""

import argparse
import logging

from subspace_jax.cli import shared

log = logging.getLogger(__name__)

_PERPLEXITY = """
    subspace-jax perplexity --model work/tiny/model --data docstrings
    subspace-jax perplexity --model DIR --data some.jsonl --length 512
    """
_ACCURACY = """
    subspace-jax accuracy --model DIR --data ai2_arc/ARC-Easy --split test
    subspace-jax accuracy --model DIR --data glue/sst2 --by-token
    """


def add_commands(commands) -> None:
    """Adds ``perplexity`` and ``accuracy``."""
    perplexity = shared.add_command(commands, "perplexity", "measure a model on text", _perplexity, _PERPLEXITY)
    add_model(perplexity)
    perplexity.add_argument(
        "--data", required=True, help="docstrings, a .jsonl, .parquet or text file, or a TFDS set (its split below)"
    )
    perplexity.add_argument("--split", default="validation")
    perplexity.add_argument("--prompt-field", default="", help="field of the prompt, which is not measured")
    perplexity.add_argument(
        "--text-field",
        default="",
        help="field of the text (default: rows are recognised by messages, of which replies are measured, by prompt "
        "and completion, or by text)",
    )
    add_chat_template(perplexity)
    _add_batch(perplexity, "tokens of an example")

    accuracy = shared.add_command(
        commands, "accuracy", "answer questions by the likeliest of their options", _accuracy, _ACCURACY
    )
    add_model(accuracy)
    accuracy.add_argument("--data", required=True, help="TFDS set with options, such as ai2_arc/ARC-Easy or glue/sst2")
    accuracy.add_argument("--data-dir", default=None, help="folder of prepared sets (default: the usual place)")
    accuracy.add_argument("--split", default="validation")
    _add_batch(accuracy, "tokens of an example, question and option together")
    accuracy.add_argument("--by-token", action="store_true", help="compare the mean over the tokens of an option")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, its tokenizer and its adapter."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face folder, GGUF file, or compressed model"
    )
    parser.add_argument(
        "--tokenizer", default="", help="file, folder or 'bytes' (default: that of the model, or bytes)"
    )
    parser.add_argument("--adapter", default=None, metavar="DIR", help="PEFT folder, LoRA or DoRA (default: none)")


def add_chat_template(parser: argparse.ArgumentParser) -> None:
    """Adds the template of conversations."""
    parser.add_argument(
        "--chat-template", default="", metavar="FILE", help="Jinja template of conversations (default: the tokenizer's)"
    )


def _add_batch(parser: argparse.ArgumentParser, length: str) -> None:
    parser.add_argument("--length", type=int, default=256, help=f"{length} (default: 256)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a batch (default: 8)")


def open_model(args: argparse.Namespace):
    """Returns the config of a run on the model, the model's own, and the tokenizer."""
    from subspace_jax import language

    config = language.default_config().unlock()
    config.model.folder, config.model.tokenizer = args.model, args.tokenizer or shared.tokenizer_of(args.model)
    model, tokenizer = language.model_of(config)
    if config.model.tokenizer == "bytes" and not args.tokenizer and tokenizer.eos_id not in model.eos_tokens:
        log.warning("%s has no tokenizer: texts are read as bytes, by which it does not seem to be trained", args.model)
    return config, model, tokenizer


def _perplexity(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import data, language, metrics
    from subspace_jax.data import text

    config, model, tokenizer = open_model(args)
    config.data.source, config.data.train_split = args.data, args.split
    config.data.prompt, config.data.completion = args.prompt_field, args.text_field
    config.data.chat_template = args.chat_template
    rows = text.pack_rows(language.texts_of(config, "train", tokenizer), tokenizer, min(args.length, model.max_length))
    task, params, mesh = _place(args)
    total, count = language.score_rows(task, params, data.eval_batches(rows, batch_size=args.batch_size), mesh)
    print(f"perplexity {float(metrics.perplexity(total, count)):.3f} over {count:.0f} tokens")


def _accuracy(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import data, language, metrics
    from subspace_jax.data import text

    _, model, tokenizer = open_model(args)
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
    from subspace_jax import language, nn, train

    mesh = train.make_mesh()
    train.check_batch_size(args.batch_size, mesh, name="--batch-size")
    model, params = language.load_adapted(
        args.model, args.adapter, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
    )
    return language.CausalLMTask(model, axes=nn.factored_axes(params, nn.param_axes(model))), params, mesh
