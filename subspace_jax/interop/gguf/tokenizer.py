"""The tokenizer in the metadata of a GGUF file, as the files of a Hugging Face folder."""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from subspace_jax.data.text import FileTokenizer
from subspace_jax.interop.config_fields import flag, naming, shown, word
from subspace_jax.interop.gguf.format import read_header

_SPACE = "▁"
# Kinds of a token.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(NamedTuple):
    """How texts are split before byte pairs are merged: by a pattern, or by GPT-2's and between digits."""

    pattern: str | None = None
    digits: bool = False
    ignores_merges: bool = False
    opens: bool = False
    composed: bool = False


# By tokenizer.ggml.pre.
_SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "refact": _Split(digits=True),
    "llama-bpe": _Split(_LLAMA3, ignores_merges=True, opens=True),
    "llama3": _Split(_LLAMA3, ignores_merges=True, opens=True),
    "llama-v3": _Split(_LLAMA3, ignores_merges=True, opens=True),
    "qwen2": _Split(_LLAMA3.replace("{1,3}", ""), composed=True),
    "deepseek-r1-qwen": _Split(_LLAMA3.replace("{1,3}", ""), composed=True),
    "tekken": _Split(_TEKKEN, ignores_merges=True, opens=True),
}


def tokenizer(path: str | os.PathLike) -> FileTokenizer:
    """Reads the tokenizer of a GGUF file.

    Args:
      path: The file.

    Raises:
      ValueError: The file is damaged, or has no tokenizer that is supported; see :func:`tokenizer_files`.
      FileNotFoundError: There is no such file.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer_files(path).items():
            pathlib.Path(folder, name).write_text(text, encoding="utf-8")
        return FileTokenizer(folder, name=path)


def tokenizer_files(path: str | os.PathLike) -> dict[str, str]:
    """Converts the tokenizer of a GGUF file to that of a Hugging Face folder.

    Byte-level BPE (``gpt2``, split as ``tokenizer.ggml.pre`` says) and sentencepiece (``llama``, whose merges follow
    from the scores of its pieces) are supported.

    Args:
      path: The file.

    Returns:
      The texts of ``tokenizer.json`` and ``tokenizer_config.json``; the second has the special tokens by their roles,
      and the chat template.

    Raises:
      ValueError: Entries are absent, of the wrong type, contradict one another, or are of another kind of tokenizer.
      FileNotFoundError: There is no such file.
    """
    metadata = read_header(path).metadata
    with naming(path):
        return _files(metadata)


def _files(metadata: Mapping[str, Any]) -> dict[str, str]:
    kind = word(metadata, "tokenizer.ggml.model", None, ("gpt2", "llama"))
    tokens = _array(metadata, "tokenizer.ggml.tokens", None, str)
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens: expected tokens, each of them once")
    roles = _roles(metadata, tokens)
    split = _SPLITS[word(metadata, "tokenizer.ggml.pre", None, _SPLITS)] if kind == "gpt2" else _Split(opens=True)
    made = _byte_pairs(metadata, tokens, split) if kind == "gpt2" else _pieces(metadata, tokens, roles)
    _add_tokens(made, metadata, tokens, roles)
    opens = flag(metadata, "tokenizer.ggml.add_bos_token", split.opens) and "bos_token" in roles
    closes = flag(metadata, "tokenizer.ggml.add_eos_token", False) and "eos_token" in roles
    _add_around(made, [roles["bos_token"]] if opens else [], [roles["eos_token"]] if closes else [])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": opens,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise ValueError(f"tokenizer.chat_template: expected a text, got {shown(template)}")
        config["chat_template"] = template
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": text}


def _array(metadata: Mapping[str, Any], name: str, length: int | None, kind: type) -> Any:
    values = metadata.get(name)
    right = isinstance(values, list) if kind is str else isinstance(values, np.ndarray)
    if not right or len(values) != (len(values) if length is None else length):
        of = "" if length is None else f"{length} "
        raise ValueError(f"{name}: expected an array of {of}{kind.__name__}, got {shown(values)}")
    return values


def _roles(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    roles = {}
    for role, name in names.items():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens) or not tokens[number]:
            raise ValueError(
                f"tokenizer.ggml.{name}_token_id: expected one of {len(tokens)} tokens that is not empty, got "
                f"{shown(number)}"
            )
        roles[role] = tokens[number]
    return roles


def _byte_pairs(metadata: Mapping[str, Any], tokens: Sequence[str], split: _Split):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in _array(metadata, "tokenizer.ggml.merges", None, str)]
    numbers = {token: number for number, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or not all(part in numbers for part in (*merge, "".join(merge))):
            raise ValueError(f"tokenizer.ggml.merges: expected two tokens whose merge is one, got {shown(merge)}")
    made = Tokenizer(models.BPE(numbers, merges, ignore_merges=split.ignores_merges))
    if split.composed:
        made.normalizer = normalizers.NFC()
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    if split.pattern is not None:
        before = [pre_tokenizers.Split(Regex(split.pattern), "isolated")]
    else:
        before = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, by_bytes])
    made.decoder = decoders.ByteLevel()
    return made


def _pieces(metadata: Mapping[str, Any], tokens: Sequence[str], roles: Mapping[str, str]):
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _array(metadata, "tokenizer.ggml.scores", len(tokens), float)
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = []
    for number in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        token = tokens[number]
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in pairs if pair[0] in numbers and pair[1] in numbers]
        merges += sorted(pairs, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    unknown = roles.get("unk_token")
    made = Tokenizer(models.BPE(numbers, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _add_tokens(made, metadata: Mapping[str, Any], tokens: Sequence[str], roles: Mapping[str, str]) -> None:
    """Marks control tokens as special, and user-defined ones as never split."""
    from tokenizers import AddedToken

    kinds = np.zeros(len(tokens), np.int32)
    if "tokenizer.ggml.token_type" in metadata:
        kinds = _array(metadata, "tokenizer.ggml.token_type", len(tokens), int)
    named = set(roles.values())
    for token, kind in zip(tokens, kinds.tolist(), strict=True):
        if token and (kind in (_UNKNOWN, _CONTROL) or token in named):
            made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token and kind == _USER_DEFINED:
            made.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_around(made, front: list[str], back: list[str]) -> None:
    from tokenizers import processors

    if front or back:
        special = [(token, made.token_to_id(token)) for token in dict.fromkeys((*front, *back))]
        made.post_processor = processors.TemplateProcessing(
            single=[*front, "$A", *back], pair=[*front, "$A", *back, *front, "$B:1", *back], special_tokens=special
        )
