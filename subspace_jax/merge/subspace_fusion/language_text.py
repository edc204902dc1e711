"""The text on which language models are measured before they are merged."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from subspace_jax import interop, train
from subspace_jax.data import text


class MergeText(NamedTuple):
    """The text on which models are measured.

    Attributes:
      files: ``.jsonl``, ``.parquet`` or plain-text files, or "docstrings": one for all models, or one for each.
      batches: Most batches.
      batch_size: Examples of a batch.
      length: Tokens of an example.
      seed: Seed of the choice of examples and of the drawn tokens.
    """

    files: tuple[str, ...]
    batches: int = 16
    batch_size: int = 4
    length: int = 256
    seed: int = 0


def rows_of_models(models: Sequence[str | os.PathLike], texts: MergeText, mesh: Mesh) -> list[dict[str, np.ndarray]]:
    """Chosen examples as tokens of each model.

    Args:
      models: Hugging Face folders of causal language models.
      texts: The text.
      mesh: The mesh that batches are sharded over.

    Returns:
      Rows of :func:`subspace_jax.data.text.pack_rows` for each model.

    Raises:
      ValueError: There is no model, one is not supported, a number is below 1, numbers of files and models differ, the
        mesh does not divide a batch, or a text has fewer examples than one.
      OSError: A file can't be read.
    """
    if not models:
        raise ValueError("models: expected at least one folder, got none")
    if len(texts.files) not in (1, len(models)):
        raise ValueError(f"--data: expected a text for all models, or one for each of {len(models)}, got {texts.files}")
    for name in ("batches", "batch_size", "length"):
        if getattr(texts, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(texts, name)}")
    train.check_batch_size(texts.batch_size, mesh, name="--batch-size")
    files = texts.files * (len(models) // len(texts.files))
    return [_rows(folder, file, texts) for folder, file in zip(models, files, strict=True)]


def _rows(folder: str | os.PathLike, file: str, texts: MergeText) -> dict[str, np.ndarray]:
    """Chosen examples of a text as tokens of a model."""
    config = interop.read_config(folder)
    tokenizer = text.load_tokenizer(folder if (pathlib.Path(folder) / "tokenizer.json").is_file() else "bytes")
    text.check_vocabulary(tokenizer, config.vocab_size)
    if file == "docstrings":
        examples = [text.Completion("", one) for one in text.docstrings(split="train")]
    else:
        examples = text.read_texts(file)
        if not isinstance(examples[0], text.Completion):
            raise ValueError(f"--data: {file} holds conversations; expected texts, or prompts with completions")
    rows = text.pack_rows(examples, tokenizer, min(texts.length, config.max_length))
    count = len(rows["inputs"])
    if count < texts.batch_size:
        raise ValueError(f"--data: {file}: expected at least a batch of {texts.batch_size} examples, got {count}")
    chosen = np.random.default_rng(texts.seed).permutation(count)[: texts.batches * texts.batch_size]
    return {name: x[chosen] for name, x in rows.items()}
