"""BERT in the files of Hugging Face, read and written."""

import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax.typing import DTypeLike

from subspace_jax.interop.config_fields import MAX_LAYERS, Fields, flag, integer, naming, number, read_fields, word
from subspace_jax.interop.hf.vit_config import activation_from_hf, activation_to_hf
from subspace_jax.interop.reading import Shardings, check_depth, match_tensors, read_params
from subspace_jax.interop.safetensors_io import open_folder
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import table_tensors
from subspace_jax.interop.writing import SHARD_BYTES, write_checkpoint
from subspace_jax.nn import BertConfig, bert_specs, stack_layers

_DEFAULTS = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
# See table_tensors.
_NAMES = {
    "embed/embedding": ("embeddings.word_embeddings.weight", 0),
    "position/embedding": ("embeddings.position_embeddings.weight", 0),
    "token_type/embedding": ("embeddings.token_type_embeddings.weight", 0),
    "norm": "embeddings.LayerNorm",
    "layers/attn/q": "encoder.layer.{}.attention.self.query",
    "layers/attn/k": "encoder.layer.{}.attention.self.key",
    "layers/attn/v": "encoder.layer.{}.attention.self.value",
    "layers/attn/out": "encoder.layer.{}.attention.output.dense",
    "layers/attn_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layers/mlp/down": "encoder.layer.{}.output.dense",
    "layers/mlp_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
# The heads of pretraining, and an array of indices that old files hold.
_IGNORED = re.compile(r"cls\.|embeddings\.position_ids$")
_OLD_NORM = {"gamma": "weight", "beta": "bias"}


def bert_config_from_hf(fields: Fields) -> BertConfig:
    """Converts the fields of ``config.json`` to a config, with a pooler; absent fields have the defaults of BERT.

    Raises:
      ValueError: The model is no BERT, a decoder, or has relative positions; or a field can't be read.
    """
    word(fields, "model_type", None, ("bert",))
    word(fields, "position_embedding_type", "absolute", ("absolute",))
    for name in ("is_decoder", "add_cross_attention"):
        if flag(fields, name, False):
            raise ValueError(f"{name}: a decoder is not supported, expected an encoder")
    own = {**_DEFAULTS, **fields}
    pad = fields.get("pad_token_id", 0)
    return BertConfig(
        vocab_size=integer(own, "vocab_size"),
        max_length=integer(own, "max_position_embeddings"),
        width=integer(own, "hidden_size"),
        num_layers=integer(own, "num_hidden_layers", most=MAX_LAYERS),
        num_heads=integer(own, "num_attention_heads"),
        mlp_size=integer(own, "intermediate_size"),
        num_types=integer(own, "type_vocab_size"),
        norm_eps=number(own, "layer_norm_eps", least=0, most=1),
        activation=activation_from_hf(own),
        pad_token=0 if pad is None else integer(fields, "pad_token_id", 0, least=0),
    )


def bert_config_to_hf(config: BertConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "type_vocab_size": config.num_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config.activation),
        "pad_token_id": config.pad_token,
    }


def load_bert(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[BertConfig, PyTree]:
    """Reads a checkpoint folder of BERT directly onto devices; heads of pretraining are ignored.

    Args:
      folder: Folder with ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      shardings: See :func:`subspace_jax.interop.load_causal_lm`.
      dtype: Dtype of the parameters; the one in the files by default.

    Returns:
      The config, with a pooler where the files have one, and the parameters, see :func:`subspace_jax.nn.bert_specs`.

    Raises:
      ValueError: The model is not supported, weights are pickled, tensors are missing, unexpected or of the wrong
        shape, or a file is damaged or truncated.
      FileNotFoundError: The folder or a file does not exist.
    """
    fields = read_fields(folder)
    with naming(pathlib.Path(folder) / "config.json"):
        config = bert_config_from_hf(fields)
    files = open_folder(folder)
    stored = {new: files[name] for name, new in _canonical_names(files).items()}
    check_depth(folder, config.num_layers, stored)
    config = config.replace(pooler="pooler.dense.weight" in stored)
    match_tensors(folder, f"a BERT with {config.num_layers} layers", _layout(config), stored)
    return config, read_params(_layout(config), stored, shardings=shardings, dtype=dtype)


def save_bert(
    folder: str | os.PathLike,
    config: BertConfig,
    params: PyTree,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    side_files: Mapping[str, pathlib.Path] | None = None,
) -> None:
    """Writes a checkpoint folder that :func:`load_bert` and ``BertModel`` of transformers read.

    Args:
      folder: Folder to write.
      config: The model.
      params: Its parameters, plain arrays, in the dtype in which they are stored; unstacked layers are stacked first.
      shard_bytes: See :func:`subspace_jax.interop.save_causal_lm`, as for the other arguments and what is raised.
      overwrite: Whether the folder may exist.
      side_files: Files to copy into the folder, by their names there.
    """
    write_checkpoint(
        folder,
        functools.partial(bert_config_to_hf, config),
        _layout(config).sorted(),
        stack_layers(params),
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        side_files=side_files,
    )


def _layout(config: BertConfig) -> TensorLayout:
    specs = bert_specs(config)
    return TensorLayout(specs, table_tensors(specs, _NAMES, "BERT"))


def _canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file, with or without the prefix ``bert.``, to those of the layout."""
    found = {}
    for name in names:
        new = name.removeprefix("bert.")
        if not _IGNORED.match(new):
            stem, _, leaf = new.rpartition(".")
            found[name] = f"{stem}.{_OLD_NORM.get(leaf, leaf)}"
    return found
