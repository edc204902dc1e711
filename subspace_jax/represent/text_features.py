"""Features of texts by a pretrained text encoder."""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import data, interop, nn, train
from subspace_jax.data.text import FileTokenizer, check_vocabulary
from subspace_jax.represent.features import FeatureModel, extract_features, make_feature_step
from subspace_jax.represent.features_file import Features

PyTree = Any

# Marks padding in the tokens of a batch.
PADDING = -1
# Texts up to this length share batches, and so do those between a power of two and the next one.
_SHORT = 16


class Texts(NamedTuple):
    """Texts, with labels where they have them.

    Attributes:
      texts: The texts.
      labels: int32 ``[examples]``; zeros for texts without labels.
      class_names: Names of the classes, by label; ``("all",)`` for texts without labels.
    """

    texts: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]


def read_labelled_texts(path: str | os.PathLike) -> Texts:
    """Reads texts: JSON lines with ``text`` and, in all lines or none, ``label``; or a text in each line.

    Args:
      path: A file in UTF-8; one that ends in ``.jsonl`` holds JSON.  Empty lines are ignored.

    Returns:
      The texts in the order of the file; classes are sorted by name, or by number where all labels are integers.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: There is no text in it, or a line is no text; the message names file and line.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"texts: {file}: no such file")
    texts, labels = [], []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"texts: {file}, line {number}"
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected UTF-8 ({error.reason})") from error
        text, label = _of_json(text, where) if file.suffix == ".jsonl" else (text, None)
        texts.append(text)
        labels.append(label)
        if (label is None) != (labels[0] is None):
            raise ValueError(f"{where}: expected a label in all lines or in none")
    if not texts:
        raise ValueError(f"texts: {file}: there is no text in it")
    if labels[0] is None:
        return Texts(texts, np.zeros(len(texts), np.int32), ("all",))
    numbers = all(isinstance(label, int) for label in labels)
    names = sorted(set(labels)) if numbers else sorted({str(label) for label in labels})
    index = {name: i for i, name in enumerate(names)}
    found = np.array([index[label if numbers else str(label)] for label in labels], np.int32)
    return Texts(texts, found, tuple(map(str, names)))


def _of_json(line: str, where: str) -> tuple[str, str | int | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object ({error})") from error
    text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a JSON object with text, a string; got {line[:80]}")
    if label is not None and (not isinstance(label, str | int) or isinstance(label, bool)):
        raise ValueError(f"{where}: expected a string or an integer as label, got {label!r}")
    return text, label


def open_text_model(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike | None = None
) -> FeatureModel:
    """Opens a text encoder, BERT or static embeddings; see :func:`subspace_jax.interop.load_text_encoder`.

    Texts longer than the encoder's ``max_length`` are truncated.

    Args:
      path: Path of the folder, with ``tokenizer.json``.
      mesh: Mesh over which batches are sharded and the model is replicated; all devices along ``data`` by default.
      dtype: Dtype of the activations; the dtype of the files by default, for static embeddings at least float32.

    Returns:
      The model, whose ``prepare`` maps a text to its tokens.

    Raises:
      FileNotFoundError: The folder does not exist, or holds no model or no tokenizer.
      ValueError: The model is not supported, or the tokenizer is that of another model.
    """
    path = pathlib.Path(path).expanduser()
    mesh = train.make_mesh() if mesh is None else mesh
    tokenizer = FileTokenizer(path)
    replicated = NamedSharding(mesh, P())
    encoder = interop.load_text_encoder(path, shardings=lambda shapes, _: jax.tree.map(lambda _: replicated, shapes))
    check_vocabulary(tokenizer, encoder.config.vocab_size)

    def compute(params: PyTree, inputs: jax.Array) -> jax.Array:
        mask = inputs != PADDING
        tokens = jnp.where(mask, inputs, 0)
        if isinstance(encoder.config, nn.BertConfig):
            states = nn.bert_apply(encoder.config, params, tokens, attention_mask=mask, dtype=dtype).tokens
        else:
            states = nn.static_embedding_apply(encoder.config, params, tokens, dtype=dtype)
        pooled = nn.mean_pool(states, mask) if encoder.pool == "mean" else states[:, 0]
        return nn.normalize(pooled) if encoder.normalize else pooled

    step = make_feature_step(compute, mesh)
    return FeatureModel(step, encoder.params, _preparation(path, tokenizer, encoder), mesh)


def _preparation(
    path: pathlib.Path, tokenizer: FileTokenizer, encoder: interop.TextEncoder
) -> Callable[[str], np.ndarray]:
    if not isinstance(encoder.config, nn.BertConfig):
        return lambda text: np.array(tokenizer.encode(text), np.int32)
    first, last, most = tokenizer.bos_id, tokenizer.eos_id, encoder.max_length
    if first is None or last is None:
        raise ValueError(f"model: {path}: expected a tokenizer with a token before and one after a text")
    return lambda text: np.array([first, *tokenizer.encode(text)[: most - 2], last], np.int32)


def features_of_texts(
    model: FeatureModel,
    texts: Sequence[str],
    labels: np.ndarray | None = None,
    class_names: Sequence[str] = ("all",),
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Features:
    """Computes the features of texts; texts of like lengths share a batch.

    Args:
      model: The model, from :func:`open_text_model`.
      texts: The texts.
      labels: Integers ``[examples]``; zeros by default.
      class_names: Names of the classes, by label.
      batch_size: Examples of a batch over all processes, rounded up to a multiple of the devices of the mesh.
      progress: Whether to show a progress bar.

    Returns:
      The features of all texts, in their order.

    Raises:
      ValueError: There are no texts, or another number of labels; or a text can't be encoded.
    """
    if not len(texts):
        raise ValueError("texts: expected at least one, got none")
    labels = np.zeros(len(texts), np.int32) if labels is None else np.asarray(labels, np.int32)
    if labels.shape != (len(texts),):
        raise ValueError(f"labels: expected [{len(texts)}], got {list(labels.shape)}")
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch_size = -(-batch_size // ways) * ways
    by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
    for i, text in enumerate(texts):
        tokens = model.prepare(text)
        by_length.setdefault(max(_SHORT, 1 << (len(tokens) - 1).bit_length()), []).append((i, tokens))
    passes = [data.eval_batches(_rows(own), batch_size=batch_size) for _, own in sorted(by_length.items())]
    found, order = extract_features(
        model.step,
        model.params,
        itertools.chain(*passes),
        mesh=model.mesh,
        num_batches=sum(-(-len(own) // batch_size) for own in by_length.values()),
        progress=progress,
    )
    features = np.empty_like(found)
    features[order] = found
    return Features(features, labels, tuple(class_names))


def _rows(examples: list[tuple[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """Pads the tokens of texts to the longest; ``labels`` are the indices of the texts."""
    rows = np.full((len(examples), max(1, *(len(tokens) for _, tokens in examples))), PADDING, np.int32)
    for row, (_, tokens) in zip(rows, examples, strict=True):
        row[: len(tokens)] = tokens
    return {"inputs": rows, "labels": np.array([i for i, _ in examples], np.int32)}
