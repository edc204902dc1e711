"""Tokenizers: any ``tokenizer.json``, and a tokenizer of bytes."""

import bisect
import contextlib
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from subspace_jax.data.text import special_tokens


class Tokenizer(Protocol):
    """The protocol of tokenizers.

    Attributes:
      vocab_size: Largest token + 1.
      bos_id: Token at the start of a text, or None.
      eos_id: Token at the end of a text, or None.
      pad_id: Padding token.
      chat_template: Jinja template of conversations, or None; see :class:`ChatTemplate`.
      special_tokens: Texts of special tokens by their roles, such as "eos_token".
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    chat_template: str | None
    special_tokens: Mapping[str, str]

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without start and end tokens."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the tokens of a text, and first character and end of each; parts of a character have its place."""

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of prompt and completion, encoded as one text.

        A token with both the end of the prompt (often a space) and the first character of the completion belongs to
        the completion.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, without special tokens."""


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, followed by padding, start and end token."""

    vocab_size, pad_id, bos_id, eos_id = 259, 256, 257, 258
    chat_template = None
    special_tokens: Mapping[str, str] = types.MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        """Returns one token for each byte."""
        _check_unicode(text)
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the bytes of a text, and the place of the character of each."""
        places = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode(errors="replace")]
        return self.encode(text), places

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Returns the bytes of prompt and completion."""
        return self.encode(prompt), self.encode(completion)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text; bytes that are not UTF-8, as of a truncated character, become U+FFFD."""
        return bytes(t for t in map(int, tokens) if 0 <= t < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer of the ``tokenizers`` library, read from a Hugging Face folder.

    Besides ``tokenizer.json``, the files ``tokenizer_config.json``, ``special_tokens_map.json`` and
    ``added_tokens.json`` define start, end and padding tokens; the chat template is that of ``chat_template.jinja`` or
    ``tokenizer_config.json``.  As in transformers, the start token is the one that the post-processor of
    ``tokenizer.json`` adds, if it has one; otherwise ``bos_token``, unless ``add_bos_token`` is false or the
    tokenizer's class adds none (GPT-2, Qwen2).  Truncation, padding and dropout stored in ``tokenizer.json`` are
    ignored.

    Args:
      path: ``tokenizer.json``, or its folder.
      name: What errors name instead of the file, where that is a temporary one.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A file is damaged, or names an unknown token.
    """

    def __init__(self, path: str | os.PathLike, *, name: str | os.PathLike | None = None):
        import tokenizers

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer: no file {file}")
        self._file = file if name is None else name
        with _naming(f"tokenizer: {file} is no tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        known = lambda token: self._tokenizer.token_to_id(token) is not None  # noqa: E731
        settings = special_tokens.read_settings(file.parent, known)
        if (padding := self._tokenizer.padding) and known(padding["pad_token"]):
            settings.setdefault("pad_token", padding["pad_token"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None
        _space_as_its_class(self._tokenizer, settings)
        self._add_tokens(settings)
        self.chat_template = special_tokens.chat_template_of(file.parent, settings)
        self.special_tokens = special_tokens.texts_by_role(settings)
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        bos, eos, pad = (self._named(settings, name) for name in ("bos_token", "eos_token", "pad_token"))
        if self._tokenizer.post_processor is None:
            self.bos_id, self.eos_id = bos if special_tokens.opens_texts(settings) else None, eos
        else:
            self.bos_id, end = self._added_around()
            self.eos_id = end if eos is None else eos
            self._tokenizer.post_processor = None  # it would also move offsets
        self.pad_id = next(t for t in (pad, self.eos_id, 0) if t is not None)
        # Ids may have gaps, so the number of tokens is no bound.
        ids = [*self._tokenizer.get_vocab(with_added_tokens=True).values(), self.bos_id, self.eos_id, self.pad_id]
        self.vocab_size = 1 + max(t for t in ids if t is not None)
        if self.vocab_size > 2**31:
            raise ValueError(f"tokenizer: {file}: expected ids below 2^31, got {self.vocab_size - 1}")

    def _add_tokens(self, settings: dict[str, Any]) -> None:
        """Adds the tokens of the files beside tokenizer.json, and marks special ones."""
        import tokenizers

        known = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        special = dict.fromkeys(special_tokens.special_names(settings))
        for number, token in sorted(settings["added_tokens"].items()):
            content = token["content"] if isinstance(token, dict) else token
            if self._tokenizer.token_to_id(content) is None:
                flags = {"special": content in special, **special_tokens.flags_of(token)}
                self._tokenizer.add_tokens([tokenizers.AddedToken(content, **flags)])
                if (got := self._tokenizer.token_to_id(content)) != number:
                    raise ValueError(
                        f"tokenizer: the files beside {self._file} give {content[:80]!r} the id {number}, which is not "
                        f"the next one after those of {self._file.name}, {got}"
                    )
        for content in special:
            if self._tokenizer.token_to_id(content) is not None:
                flags = {name: getattr(known[content], name) for name in _MATCHING} if content in known else {}
                token = tokenizers.AddedToken(content, **{"normalized": False, **flags, "special": True})
                self._tokenizer.add_special_tokens([token])

    def _named(self, settings: dict[str, Any], key: str) -> int | None:
        token = special_tokens.role_of(settings, key)
        if token is None:
            return None
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(
                f"tokenizer: {key} {token[:80]!r} of tokenizer_config.json or special_tokens_map.json is no token of "
                f"{self._file}"
            )
        return number

    def _added_around(self) -> tuple[int | None, int | None]:
        """Finds what the post-processor puts before and after a text, by a text of one token."""
        import tokenizers

        probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        probe.post_processor = self._tokenizer.post_processor
        with _naming(f"tokenizer: {self._file}: post_processor"):
            found = probe.encode("a")
        at = (*found.special_tokens_mask, 0).index(0)
        front, back = found.ids[:at], found.ids[at + 1 :]
        if len(front) > 1:
            raise ValueError(
                f"tokenizer: {self._file}: post_processor: expected at most one token before a text, got {front}"
            )
        return front[0] if front else None, back[-1] if back else None

    def _encode(self, text: str):
        _check_unicode(text)
        with _naming(f"tokenizer: {self._file} can't encode {text[:40]!r}"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, none added.

        Raises:
          ValueError: The tokenizer has no token for a part of the text, and no unknown token.
        """
        return self._encode(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the tokens of a text, and first character and end of each; see :class:`Tokenizer`."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of prompt and completion, encoded as one text; see :class:`Tokenizer`."""
        if not prompt:
            return [], self.encode(completion)
        encoding = self._encode(prompt + completion)
        first = bisect.bisect_right(encoding.offsets, len(prompt), key=lambda span: span[1])
        return encoding.ids[:first], encoding.ids[first:]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones."""
        with _naming(f"tokenizer: {self._file} can't decode"):
            return self._tokenizer.decode([int(t) for t in np.asarray(tokens)], skip_special_tokens=True)


def _space_as_its_class(tokenizer, settings: dict[str, Any]) -> None:
    """Treats spaces as transformers' classes for GPT-2, Qwen2 and Llama do, which override ``tokenizer.json``.

    They use ``add_prefix_space``, and Llama's (not Code Llama's) ``legacy``, which also adds a space after each special
    token.
    """
    from tokenizers import decoders, pre_tokenizers

    family, prefix = settings["family"], settings.get("add_prefix_space")
    parts = f"{tokenizer.normalizer} {tokenizer.pre_tokenizer} {tokenizer.decoder} {tokenizer.post_processor}"
    if family in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
            tokenizer.pre_tokenizer.add_prefix_space = bool(prefix)
    elif family in ("LlamaTokenizer", "CodeLlamaTokenizer") and _SPACE in parts and "ByteLevel" not in parts:
        prefix, everywhere = prefix is None or prefix, family == "LlamaTokenizer" and settings.get("legacy")
        scheme = "never" if not prefix else "always" if everywhere else "first"
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(" ", 1, 0)] if prefix or family == "CodeLlamaTokenizer" else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )


_SPACE = "▁"
_MATCHING = ("single_word", "lstrip", "rstrip", "normalized")


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turns exceptions and panics of the tokenizers library into ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what} ({' '.join(str(error).split())[:200]})") from error


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: character {error.start}: expected Unicode text, got half of a surrogate pair in {text[:40]!r}"
        ) from error


def decode_continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Returns the text that new tokens add to a prompt.

    Decoded separately, new tokens may lose a leading space, or the first bytes of a character.

    Args:
      tokenizer: The tokenizer.
      prompt: Tokens of the prompt.
      new: Tokens that follow.

    Returns:
      The text that follows the text of the prompt.
    """
    prompt, new = ([int(t) for t in np.asarray(tokens)] for tokens in (prompt, new))
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return whole[same:]


def stream_continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int]) -> Iterator[str]:
    """Yields the text of :func:`decode_continuation` piece by piece, as tokens come.

    Args:
      tokenizer: The tokenizer.
      prompt: Tokens of the prompt.
      new: Tokens that follow, perhaps one at a time.

    Returns:
      An iterator over texts; a character is given once its last byte is there.
    """
    tokens, shown = [], ""
    for token in new:
        tokens.append(int(token))
        text = decode_continuation(tokenizer, prompt, tokens)
        if not text.endswith("\ufffd") and text.startswith(shown) and text != shown:
            yield text[len(shown) :]
            shown = text
    text = decode_continuation(tokenizer, prompt, tokens)
    if text.startswith(shown) and text != shown:
        yield text[len(shown) :]


def load_tokenizer(name: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a file or folder, or :class:`ByteTokenizer` for ``"bytes"``."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that the embedding table of a model covers a tokenizer.

    Raises:
      ValueError: The largest token is at least ``vocab_size``.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer: it has {tokenizer.vocab_size} tokens, the model has rows for {vocab_size} (the largest id is "
            f"{tokenizer.vocab_size - 1}); they belong to different checkpoints"
        )
