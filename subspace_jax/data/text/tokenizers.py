"""Tokenizers: any ``tokenizer.json``, and bytes for when there is no file."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
      vocab_size: Tokens are below this.
      bos_id: Token that opens a text, or None.
      eos_id: Token that ends a text, or None.
      pad_id: Token that fills up rows.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, none added."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, without those that are no text."""


class ByteTokenizer:
    """The bytes of UTF-8 as tokens 0 to 255, then padding, beginning and end: 259 tokens, and no file."""

    vocab_size, pad_id, bos_id, eos_id = 259, 256, 257, 258

    def encode(self, text: str) -> list[int]:
        """Returns one token for each byte."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text; bytes that are no UTF-8 become U+FFFD, as where a text is cut inside a character."""
        return bytes(t for t in map(int, tokens) if 0 <= t < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer of the ``tokenizers`` library, as Hugging Face folders hold it.

    Which tokens open, end and fill is read from ``tokenizer_config.json`` beside the file, where there is one.

    Args:
      path: ``tokenizer.json``, or a folder that holds it.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no tokenizer, or the config names a token that the tokenizer doesn't know.
    """

    def __init__(self, path: str | os.PathLike):
        import tokenizers

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer: no file {file}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"tokenizer: {file} is no tokenizer ({error})") from error
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        named = functools.partial(self._named, _read_config(file.parent / "tokenizer_config.json"), file)
        self.bos_id, self.eos_id, pad = named("bos_token"), named("eos_token"), named("pad_token")
        self.pad_id = next(t for t in (pad, self.eos_id, 0) if t is not None)

    def _named(self, config: dict[str, Any], file: Path, key: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"tokenizer: {key} {token!r} of tokenizer_config.json is no token of {file}")
        return number

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, none added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones."""
        return self._tokenizer.decode([int(t) for t in np.asarray(tokens)], skip_special_tokens=True)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"tokenizer: {file} is no JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def load_tokenizer(name: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a file or folder, or that of bytes for ``"bytes"``."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError where a model has no row for some token of a tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, the model has rows for {vocab_size}; "
            "they belong to different checkpoints"
        )
