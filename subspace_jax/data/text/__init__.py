"""Text: tokenizers, examples from files and datasets, chat templates, padded and packed rows of tokens."""

from subspace_jax.data.text.chat_template import ChatTemplate, load_chat_template
from subspace_jax.data.text.conversations import Conversation, conversation_of
from subspace_jax.data.text.corpus import docstrings, function_summaries
from subspace_jax.data.text.dialects import dialects
from subspace_jax.data.text.holdout import count_different, hold_out
from subspace_jax.data.text.records import (
    Choice,
    Completion,
    DomainCompletion,
    Passage,
    holds_conversations,
    json_rows,
    mapping_of,
    read_texts,
    tfds_texts,
)
from subspace_jax.data.text.rows import choice_rows, encode, pack_rows, pad_rows
from subspace_jax.data.text.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    check_vocabulary,
    decode_continuation,
    load_tokenizer,
    stream_continuation,
)

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "Choice",
    "Completion",
    "Conversation",
    "DomainCompletion",
    "FileTokenizer",
    "Passage",
    "Tokenizer",
    "check_vocabulary",
    "choice_rows",
    "conversation_of",
    "count_different",
    "decode_continuation",
    "dialects",
    "docstrings",
    "encode",
    "function_summaries",
    "hold_out",
    "holds_conversations",
    "json_rows",
    "load_chat_template",
    "load_tokenizer",
    "mapping_of",
    "pack_rows",
    "pad_rows",
    "read_texts",
    "stream_continuation",
    "tfds_texts",
]
