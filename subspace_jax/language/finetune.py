"""Runs that train a causal language model, as configs describe them."""

import functools
import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

from subspace_jax import data, interop, nn, train
from subspace_jax.data import text
from subspace_jax.language.causal_lm import CausalLMTask

SIZES = {
    "tiny": nn.CausalLMConfig.tiny,
    "gpt2": nn.CausalLMConfig.gpt2,
    "gpt2-medium": functools.partial(nn.CausalLMConfig.gpt2, hidden_size=1024, num_layers=24, num_heads=16),
    "llama3-8b": functools.partial(nn.CausalLMConfig.llama3, "8b"),
    "llama3-70b": functools.partial(nn.CausalLMConfig.llama3, "70b"),
    "mistral-7b": functools.partial(nn.CausalLMConfig.mistral, "7b"),
    "qwen2-7b": functools.partial(nn.CausalLMConfig.qwen2, "7b"),
}


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``model.folder`` is a Hugging Face folder to start from; without one, ``model.size`` names an architecture that
    starts from random numbers.  ``model.tokenizer`` is "bytes", a file or a folder; empty, it is that of
    ``model.folder``, or bytes.  ``data.source`` is "docstrings" (what is installed here, see
    :func:`subspace_jax.data.text.docstrings`), a ``.jsonl``, ``.parquet`` or text file, or a TFDS set; ``data.prompt``
    and ``data.completion`` name the fields of a file.  ``data.evaluation`` is a second file, or empty for a split.
    """
    config = train.default_config()
    config.task = "subspace_jax.language.finetune"
    config.data = ConfigDict(
        {
            "source": "docstrings",
            "evaluation": "",
            "data_dir": "",
            "train_split": "train",
            "eval_split": "validation",
            "prompt": "",
            "completion": "text",
            "length": 256,
            "longer": "split",
            "batch_size": 16,
            "eval_batch_size": 16,
        }
    )
    config.model = ConfigDict(
        {"folder": "", "size": "tiny", "tokenizer": "", "dtype": "float32", "remat": "none", "loss_chunk": 0}
    )
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    return config.lock()


def build(config: ConfigDict) -> tuple[CausalLMTask, train.Data]:
    """Makes the task and the data of a config, as :func:`subspace_jax.train.build` asks for them.

    Raises:
      ValueError: A name is unknown, sizes don't fit together, or a file is malformed (file and line are named).
      FileNotFoundError: A file or set is not there.
    """
    model, tokenizer = model_of(config)
    sizes = config.data
    if sizes.length > model.max_length:
        raise ValueError(f"data.length: {sizes.length} places in a row, the model has {model.max_length}")
    rows = [
        text.pack_rows(texts_of(config, split), tokenizer, sizes.length, longer=sizes.longer)
        for split in ("train", "eval")
    ]
    task = CausalLMTask(
        model,
        train.make_mesh(**config.mesh),
        folder=config.model.folder or None,
        dtype=config.model.dtype,
        remat=config.model.remat,
        loss_chunk=config.model.loss_chunk,
    )
    batches = functools.partial(data.train_batches, rows[0], batch_size=sizes.batch_size)
    batches(seed=config.seed)  # what is wrong with batch size or seed shows now
    return task, train.Data(
        batch_size=sizes.batch_size,
        steps_per_epoch=data.steps_per_epoch(len(rows[0]["inputs"]), sizes.batch_size),
        train=lambda seed: batches(seed=seed),
        evaluate=functools.partial(data.eval_batches, rows[1], batch_size=sizes.eval_batch_size),
    )


def model_of(config: ConfigDict) -> tuple[nn.CausalLMConfig, text.Tokenizer]:
    """Returns the model that a config asks for, and its tokenizer.

    Raises:
      ValueError: The size is unknown, or the tokenizer has tokens that the model has no row for.
      FileNotFoundError: The folder or the tokenizer is not there.
    """
    folder, size = config.model.folder, config.model.size
    where = config.model.tokenizer or folder or "bytes"
    tokenizer = text.load_tokenizer(where)
    if folder:
        model = interop.read_config(folder)
    elif size in SIZES:
        ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        tokens = {"bos_token": tokenizer.bos_id, "eos_tokens": ends, "pad_token": tokenizer.pad_id}
        # An architecture keeps its own number of rows; the smallest one is made to measure.
        model = SIZES[size](**({"vocab_size": tokenizer.vocab_size} if size == "tiny" else {}), **tokens)
    else:
        raise ValueError(f"model.size: expected one of {sorted(SIZES)}, got {size!r}")
    text.check_vocabulary(tokenizer, model.vocab_size)
    return model, tokenizer


def texts_of(config: ConfigDict, split: str) -> list[text.Completion]:
    """Returns the examples of "train" or "eval" that a config asks for."""
    sizes = config.data
    name = {"train": sizes.train_split, "eval": sizes.eval_split}[split]
    if sizes.source == "docstrings":
        return [text.Completion("", t) for t in text.docstrings(split=name)]
    source = sizes.evaluation if split == "eval" and sizes.evaluation else sizes.source
    if Path(source).suffix in (".jsonl", ".parquet", ".txt", ".md") or Path(source).is_file():
        if split == "eval" and not sizes.evaluation:
            raise ValueError(f"data.evaluation: expected a second file beside {sizes.source}, got none")
        return text.read_texts(source, prompt=sizes.prompt, completion=sizes.completion)
    examples = text.tfds_texts(source, name, sizes.data_dir or None)
    if not isinstance(examples[0], text.Completion):
        raise ValueError(f"data.source: {source!r} is a set of questions with options, which are no texts to train on")
    return examples


def export(workdir: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Writes the latest checkpoint of a run as a Hugging Face folder, float32, with its tokenizer if it has a file.

    Args:
      workdir: Folder of the run.
      folder: Where to write; a checkpoint that is there is replaced once the new one is whole.

    Raises:
      FileNotFoundError: There is no run or no checkpoint.
      OSError: Writing failed.
    """
    experiment, state = train.restore(workdir)
    interop.save_causal_lm(folder, experiment.task.config, state.params, overwrite=True)
    where = experiment.config.model.tokenizer or experiment.config.model.folder
    if where and where != "bytes" and jax.process_index() == 0:
        source = Path(where) if Path(where).is_dir() else Path(where).parent
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (source / name).is_file():
                (Path(folder) / name).write_bytes((source / name).read_bytes())
