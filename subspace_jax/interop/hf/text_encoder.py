"""Text encoders with the pooling of sentence-transformers: BERT, and static embeddings of tokens."""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from subspace_jax.data.json_object import read_json_object
from subspace_jax.interop.config_fields import dims, naming, shown
from subspace_jax.interop.hf.bert import load_bert
from subspace_jax.interop.reading import Shardings, match_tensors, read_params
from subspace_jax.interop.safetensors_io import open_folder
from subspace_jax.interop.tensors import Place, PyTree, TensorLayout, TensorName
from subspace_jax.nn import BertConfig, StaticEmbeddingConfig, static_embedding_specs

POOLS = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}


class TextEncoder(NamedTuple):
    """A text encoder.

    Attributes:
      config: The model: :class:`subspace_jax.nn.BertConfig` or :class:`subspace_jax.nn.StaticEmbeddingConfig`.
      params: Its parameters.
      pool: "mean" over the tokens of a text, or the "first" token.
      normalize: Whether the vectors have unit length.
      max_length: Longest text, in tokens; None for any length.
    """

    config: BertConfig | StaticEmbeddingConfig
    params: PyTree
    pool: str
    normalize: bool
    max_length: int | None


def load_text_encoder(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> TextEncoder:
    """Reads a BERT or a table of static embeddings with its pooling, as sentence-transformers would.

    ``modules.json`` names the pooling (mean or first token) and whether vectors are normalized, and
    ``sentence_bert_config.json`` the longest text.  A folder of BERT without these has mean pooling, normalized.

    Args:
      folder: Folder of a checkpoint, see :func:`load_bert`, or of a ``StaticEmbedding``.
      shardings: See :func:`subspace_jax.interop.load_causal_lm`.
      dtype: Dtype of the parameters; the one in the files by default.

    Raises:
      ValueError: ``modules.json`` has other modules, the model is not supported, or a file is damaged.
      FileNotFoundError: The folder or a file does not exist.
    """
    folder = pathlib.Path(folder)
    modules = _modules(folder)
    normalize = not modules or modules[-1][0] == "Normalize"
    kinds = [kind for kind, _ in modules if kind != "Normalize"]
    if kinds == ["StaticEmbedding"]:
        config, params = _load_table(folder / modules[0][1], shardings, dtype)
        return TextEncoder(config, params, "mean", normalize, None)
    if kinds and kinds != ["Transformer", "Pooling"]:
        expected = "Transformer and Pooling, or StaticEmbedding, with or without Normalize at the end"
        raise ValueError(f"{folder / 'modules.json'}: expected {expected}; got {', '.join(map(shown, kinds))}")
    pool = _pool(folder / modules[1][1] / "config.json") if modules else "mean"
    where = folder / modules[0][1] if modules else folder
    config, params = load_bert(where, shardings=shardings, dtype=dtype)
    return TextEncoder(config, params, pool, normalize, _max_length(where, config))


def _modules(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Returns kind and subfolder of each module of sentence-transformers."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    found = []
    with naming(file):
        for entry in _json_list(file):
            kind, path = (entry.get(name) if isinstance(entry, dict) else None for name in ("type", "path"))
            if not isinstance(kind, str) or not isinstance(path, str) or not re.fullmatch(r"\w{0,100}", path):
                raise ValueError(f"expected modules with a type and the path of a folder here, got {shown(entry)}")
            found.append((kind.rpartition(".")[2], path))
    return found


def _json_list(file: pathlib.Path) -> list[Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in UTF-8 ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of modules, got {shown(value)}")
    return value


def _pool(file: pathlib.Path) -> str:
    fields = read_json_object(file)
    chosen = [name.removeprefix("pooling_mode_") for name, value in fields.items() if value is True]
    chosen = [name for name in chosen if f"pooling_mode_{name}" in fields]
    if isinstance(fields.get("pooling_mode"), str):
        chosen = [fields["pooling_mode"]]
    if len(chosen) != 1 or chosen[0] not in POOLS:
        raise ValueError(f"{file}: expected the pooling of mean_tokens or cls_token, got {shown(chosen)}")
    return POOLS[chosen[0]]


def _max_length(folder: pathlib.Path, config: BertConfig) -> int:
    file = folder / "sentence_bert_config.json"
    if not file.is_file():
        return config.max_length
    length = read_json_object(file).get("max_seq_length")
    if length is None:
        return config.max_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 3:
        raise ValueError(f"{file}: max_seq_length: expected an integer of at least 3, got {shown(length)}")
    return min(length, config.max_length)


def _load_table(
    folder: pathlib.Path, shardings: Shardings | None, dtype: DTypeLike | None
) -> tuple[StaticEmbeddingConfig, PyTree]:
    stored = open_folder(folder)
    name = "embeddings" if "embeddings" in stored else "embedding.weight"
    if name not in stored:
        raise ValueError(
            f"{folder}: expected static embeddings, a tensor {name}; the weights have {sorted(stored)[:8]}"
        )
    vocab_size, width = dims({name: stored[name].shape}, name, 2)
    config = StaticEmbeddingConfig(vocab_size, width)
    tensor = TensorName(name, Place(("embed", "embedding")), False)
    layout = TensorLayout(static_embedding_specs(config), [tensor])
    match_tensors(folder, "a table of static embeddings", layout, stored)
    return config, read_params(layout, stored, shardings=shardings, dtype=dtype)
