"""The commands that train a language model, and write one as a folder."""

import argparse
import os

from subspace_jax.cli import runs, shared

_PRETRAIN = """
    subspace-jax pretrain --config lm/tiny --workdir work/tiny     # ends with work/tiny/model
    """
_FINETUNE = """
    subspace-jax finetune --config lm/tiny --model work/tiny/model --workdir work/tuned \\
        --config.data.source=my.jsonl --config.data.evaluation=other.jsonl
    subspace-jax finetune --config lm/tiny --model work/tiny/model --workdir work/dora \\
        --config.adapter.method=dora --config.adapter.rank=16     # ends with work/dora/adapter, for PEFT
    subspace-jax fetch smollm2 && subspace-jax finetune --config lm/smollm2:lora --workdir work/smollm2
    """
_MERGE = """
    subspace-jax merge --model work/tiny/model --adapter work/dora/adapter --out work/merged
    """
_EXPORT = """
    subspace-jax export --workdir work/dora --out work/adapter --best
    subspace-jax export --workdir work/dora --out work/merged --merged
    """


def add_commands(commands) -> None:
    """Adds ``pretrain``, ``finetune``, ``merge`` and ``export``."""
    summary = "train a language model from scratch, and write it as a Hugging Face folder"
    pretrain = shared.add_command(commands, "pretrain", summary, _run, _PRETRAIN, fields=True, trains=True)
    summary = "fine-tune a language model, all parameters or adapters, and write it as a Hugging Face or PEFT folder"
    finetune = shared.add_command(commands, "finetune", summary, _finetune, _FINETUNE, fields=True, trains=True)
    finetune.add_argument(
        "--model", metavar="DIR", help="Hugging Face folder or GGUF file to start from (default: that of the config)"
    )
    for parser in (pretrain, finetune):
        runs.add_arguments(parser)

    summary = "merge a PEFT adapter into a model, and write it as a Hugging Face folder"
    merge = shared.add_command(commands, "merge", summary, _merge, _MERGE)
    merge.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder, or GGUF file")
    merge.add_argument("--adapter", required=True, metavar="DIR", help="PEFT folder, LoRA or DoRA")
    merge.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write, with the model's tokenizer, generation config and templates; new or empty",
    )

    summary = "write a checkpoint of a language model's run as a Hugging Face or PEFT folder"
    export = shared.add_command(commands, "export", summary, _export, _EXPORT)
    export.add_argument("--workdir", required=True, help="folder of the run")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write; new or empty")
    shared.add_trust(export)
    export.add_argument("--merged", action="store_true", help="merge adapters into the weights (default: PEFT folder)")
    shared.add_checkpoint(export)


def _finetune(args: argparse.Namespace, overrides: list[str]) -> None:
    folder = []
    if args.model is not None:
        tokenizer = shared.tokenizer_of(args.model)
        folder = [f"model.folder={args.model}", *([f"model.tokenizer={tokenizer}"] if tokenizer else [])]
    _run(args, [*folder, *shared.recipe_of(overrides), *overrides])


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    import math

    from subspace_jax import language, train

    config = train.load_config(args.config)
    if "folder" not in config.get("model", {}):
        raise ValueError(
            f"--config {args.config}: expected a config of a language model (it has no field model.folder)"
        )
    config = train.override(config, runs.settings(args, overrides))
    if args.command == "finetune":
        shared.check_model_folder(config.model.folder)
    if runs.shown_only(args, overrides, config):
        return
    is_peft, chats = language.is_peft(config), language.trains_on_conversations(config)
    metrics = train.run(
        config, args.workdir, progress=not args.quiet, restart=args.restart, change_seed=args.change_seed
    ).metrics
    folder = os.path.join(os.path.abspath(args.workdir), "adapter" if is_peft else "model")
    what = "adapter" if is_peft else "merged model" if config.adapter.method else "model"
    runs.say(args, f"Export: writing the {what} …")
    # The task is that of the config that was given, which has run.
    language.export(args.workdir, folder, merged=not is_peft, trust_remote_code=True)
    shared.write_result(args.workdir, metrics)
    print(f"loss {metrics['loss']:.4f}; perplexity {math.exp(metrics['loss']):.2f}; accuracy {metrics['accuracy']:.4f}")
    print(f"Wrote the {what} to {folder}, checkpoints, metrics.jsonl, result.json and curves.png beside it")
    model = [config.model.folder, "--adapter", folder] if is_peft else [folder]
    asked = ["--chat"] if chats else ["--prompt", "Once upon a time"]
    if chats and is_peft and config.data.chat_template:  # an exported model has it in its folder
        asked += ["--chat-template", config.data.chat_template]
    runs.next_command("subspace-jax", "generate", "--model", *model, *asked)


def _merge(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import language

    language.merge_adapter(args.model, args.adapter, args.out)
    print(f"Wrote the merged model to {os.path.abspath(args.out)}")


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import language

    step = "best" if args.best else args.step
    trust = args.trust_remote_code
    options = {"merged": args.merged, "step": step, "overwrite": False, "trust_remote_code": trust}
    step = language.export(args.workdir, args.out, **options)
    print(f"Wrote the checkpoint of step {step} to {os.path.abspath(args.out)}")
