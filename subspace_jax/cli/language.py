"""The commands for language models."""

import argparse
import logging
import os
from collections.abc import Callable

log = logging.getLogger(__name__)


def add_commands(commands, add: Callable) -> None:
    """Adds those that read a Hugging Face folder and train nothing."""
    generate = add(commands, "generate", "continue a prompt")
    _add_model(generate)
    _add_adapter(generate)
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument(
        "--max-new-tokens", type=int, default=64, help="at most so many; the model's ends come first (default: 64)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default); else from 1e-6 on"
    )
    generate.add_argument("--top-p", type=float, default=1.0, help="share of the probability to draw from")
    generate.add_argument("--seed", type=int, default=0)

    perplexity = add(commands, "perplexity", "measure a model on text")
    _add_model(perplexity)
    _add_adapter(perplexity)
    perplexity.add_argument(
        "--data", required=True, help="docstrings, a .jsonl, .parquet or text file, or a TFDS set (its split below)"
    )
    perplexity.add_argument("--split", default="validation")
    perplexity.add_argument("--prompt-field", default="", help="field of the prompt, which is given and not measured")
    perplexity.add_argument("--text-field", default="text", help="field of the text")
    perplexity.add_argument("--length", type=int, default=256, help="tokens in a row")
    perplexity.add_argument("--batch-size", type=int, default=8)

    accuracy = add(commands, "accuracy", "answer questions by the likeliest of their options")
    _add_model(accuracy)
    _add_adapter(accuracy)
    accuracy.add_argument("--data", required=True, help="TFDS set with options, such as ai2_arc/ARC-Easy or glue/sst2")
    accuracy.add_argument("--data-dir", default=None, help="folder of prepared sets (default: the usual place)")
    accuracy.add_argument("--split", default="validation")
    accuracy.add_argument("--length", type=int, default=256, help="tokens in a row, question and option together")
    accuracy.add_argument("--batch-size", type=int, default=8)
    accuracy.add_argument("--by-token", action="store_true", help="compare the mean over the tokens of an option")

    merge = add(commands, "merge", "bake a PEFT adapter into a model, and write it as a Hugging Face folder")
    merge.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    merge.add_argument("--adapter", required=True, metavar="DIR", help="PEFT folder, LoRA or DoRA")
    merge.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write, with tokenizer, generation config and templates of the model; not there yet, or empty",
    )

    export = add(commands, "export", "write a checkpoint of a language model's run as a Hugging Face or PEFT folder")
    export.add_argument("--workdir", required=True, help="folder of the run")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write; not there yet, or empty")
    add_trust(export)
    export.add_argument("--merged", action="store_true", help="bake adapters into the weights (default: a PEFT folder)")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    which.add_argument("--best", action="store_true", help="the best checkpoint, by train.best of the config")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that read the config of a run."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="import the task that the run's config.json names though it is not of this library, which runs its code",
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", default=None, metavar="DIR", help="PEFT folder, LoRA or DoRA (default: none)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--tokenizer", default="", help="file, folder or 'bytes' (default: that of the model, or bytes)"
    )


def _pretrain(args: argparse.Namespace, overrides: list[str]) -> None:
    _run(args, overrides)


def _finetune(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import train

    tokenizer = _own_tokenizer(args.model)
    folder = [f"model.folder={args.model}", *([f"model.tokenizer={tokenizer}"] if tokenizer else [])]
    # A config's learning rate is for all parameters, unless it names a method itself.
    method = next((text.partition("=")[2] for text in reversed(overrides) if text.startswith("adapter.method=")), "")
    recipe = [f"optim.{name}={value}" for name, value in train.adapter_recipe(method).items()] if method else []
    _run(args, [*folder, *recipe, *overrides])


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    import math

    from subspace_jax import language, train

    config = train.load_config(args.config)
    if "folder" not in config.get("model", {}):
        raise ValueError(
            f"--config {args.config}: expected a config of a language model (it has no field model.folder)"
        )
    config = train.override(config, overrides)
    is_peft = language.is_peft(config)
    _, metrics = train.run(
        config, args.workdir, progress=not args.quiet, restart=args.restart, change_seed=args.change_seed
    )
    folder = os.path.join(os.path.abspath(args.workdir), "adapter" if is_peft else "model")
    # The task is that of the config that was given, which has run.
    language.export(args.workdir, folder, merged=not is_peft, trust_remote_code=True)
    print(f"loss {metrics['loss']:.4f}; perplexity {math.exp(metrics['loss']):.2f}; accuracy {metrics['accuracy']:.4f}")
    what = "adapter" if is_peft else "merged model" if config.adapter.method else "model"
    print(f"Wrote the {what} to {folder}, checkpoints, metrics.jsonl and curves.png beside it")


def _open(args: argparse.Namespace):
    from subspace_jax import language

    config = language.default_config().unlock()
    config.model.folder, config.model.tokenizer = args.model, args.tokenizer or _own_tokenizer(args.model)
    model, tokenizer = language.model_of(config)
    if config.model.tokenizer == "bytes" and not args.tokenizer and tokenizer.eos_id not in model.eos_tokens:
        log.warning("%s has no tokenizer: texts are read as bytes, by which it does not seem to be trained", args.model)
    return config, model, tokenizer


def _own_tokenizer(folder: str) -> str:
    """A model that was trained on bytes has no tokenizer file; one with files of another kind was not."""
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return ""
    for name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model"):
        if os.path.isfile(os.path.join(folder, name)):
            raise ValueError(
                f"{folder}: expected a tokenizer.json beside {name}; transformers' AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...) writes one, and --tokenizer names one elsewhere"
            )
    return "bytes"


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
    return language.CausalLMTask(model, mesh), params, mesh


def _merge(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import language

    language.merge_adapter(args.model, args.adapter, args.out)
    print(f"Wrote the merged model to {os.path.abspath(args.out)}")


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import language

    step = "best" if args.best else args.step
    trust = args.trust_remote_code
    language.export(args.workdir, args.out, merged=args.merged, step=step, overwrite=False, trust_remote_code=trust)
    print(f"Wrote the checkpoint to {os.path.abspath(args.out)}")


ACTIONS = {
    "pretrain": _pretrain,
    "finetune": _finetune,
    "generate": _generate,
    "perplexity": _perplexity,
    "accuracy": _accuracy,
    "merge": _merge,
    "export": _export,
}
