"""Text: tokenizers, examples from files and datasets, padded and packed rows of tokens."""

from subspace_jax.data.text.corpus import docstrings, function_summaries
from subspace_jax.data.text.records import Choice, Completion, mapping_of, read_texts, tfds_texts
from subspace_jax.data.text.rows import choice_rows, encode, pack_rows, pad_rows
from subspace_jax.data.text.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    check_vocabulary,
    decode_continuation,
    load_tokenizer,
)

__all__ = [
    "ByteTokenizer",
    "Choice",
    "Completion",
    "FileTokenizer",
    "Tokenizer",
    "check_vocabulary",
    "choice_rows",
    "decode_continuation",
    "docstrings",
    "encode",
    "function_summaries",
    "load_tokenizer",
    "mapping_of",
    "pack_rows",
    "pad_rows",
    "read_texts",
    "tfds_texts",
]
