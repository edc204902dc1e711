"""Tokenizers in GGUF files.

``tests/golden/gguf/tokens.json`` has texts and their tokens: of sentencepiece 0.2 for ``tiny_llama.gguf``, with the
parts around an added token encoded apart, and of tokenizers 0.23 for ``tiny_qwen2.gguf``.
"""

import json

import numpy as np
import pytest

from subspace_jax.data.text import FileTokenizer
from subspace_jax.interop import gguf

from . import gguf_files

TOKENS = json.loads((gguf_files.GOLDEN / "tokens.json").read_text())
KINDS = {"llama": "sentencepiece", "qwen2": "bpe"}


@pytest.fixture(scope="module")
def tiny():
    return {name: gguf.tokenizer(gguf_files.GOLDEN / f"tiny_{name}.gguf") for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("number", range(len(TOKENS["samples"])))
def test_tokenizer_gives_the_tokens_of_the_original(name, number, tiny):
    text, wanted = TOKENS["samples"][number], TOKENS[KINDS[name]][number]
    assert tiny[name].encode(text) == wanted
    if name == "qwen2":
        text = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    # Each part begins with a space of its own.
    assert tiny[name].decode(wanted) == (text.replace("<tool>", "<tool> ") if name == "llama" else text)


def test_tokenizer_reads_special_tokens_and_the_chat_template(tiny):
    assert (tiny["llama"].bos_id, tiny["llama"].eos_id) == (1, 2)
    assert tiny["llama"].special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tiny["llama"].chat_template.startswith("{% for m in messages %}")
    named = tiny["qwen2"].special_tokens
    assert named == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tiny["qwen2"].bos_id is None
    assert [tiny["qwen2"].decode([tiny["qwen2"].eos_id]), tiny["qwen2"].vocab_size] == ["", 432]


def metadata_of(name="qwen2", **changes):
    found = dict(gguf.read_header(gguf_files.GOLDEN / f"tiny_{name}.gguf").metadata)
    changes = {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    found = {**found, **changes}
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in found.items()
        if key.startswith("tokenizer.") and value is not None
    }


def tokenizer_of(tmp_path, name="qwen2", **changes):
    path = gguf_files.write(tmp_path / "a.gguf", metadata_of(name, **changes), {"w": np.ones((1, 32), np.float32)})
    return gguf.tokenizer(path)


@pytest.mark.parametrize(
    ("pre", "parts"),
    [
        ("gpt-2", ["it", "'s", "Ġ1234", "ĊĊĠ", "Ġx", "?", "Ċ"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "ĊĊĠ", "Ġx", "?", "Ċ"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "4", "ĊĊ", "Ġ", "Ġx", "?Ċ"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġ", "Ġx", "?Ċ"]),
        ("tekken", ["it", "'s", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġ", "Ġx", "?Ċ"]),
    ],
)
def test_tokenizer_splits_texts_as_the_file_says(pre, parts, tmp_path):
    # Pairs merge within a part only, so a vocabulary of all substrings shows the parts.
    text = "it's 1234\n\n  x?\n".replace("\n", "Ċ").replace(" ", "Ġ")
    pieces = sorted({text[a:b] for a in range(len(text)) for b in range(a + 1, len(text) + 1)}, key=len)
    merges = [f"{piece[:at]} {piece[at:]}" for piece in pieces for at in range(1, len(piece))]
    ids = {f"ggml__{name}_token_id": None for name in ("bos", "eos", "padding")}
    fields = {"ggml__tokens": pieces, "ggml__merges": merges, "ggml__token_type": None, "ggml__pre": pre, **ids}
    found = tokenizer_of(tmp_path, **fields)
    assert [pieces[token] for token in found.encode("it's 1234\n\n  x?\n")] == parts


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({"ggml__add_bos_token": True}, (420, 422)),
        ({"ggml__add_bos_token": None}, (None, 422)),
        ({"ggml__add_bos_token": None, "ggml__pre": "llama-bpe"}, (420, 422)),
        ({"ggml__add_bos_token": True, "ggml__add_eos_token": True}, (420, 422)),
        ({"ggml__add_bos_token": True, "ggml__bos_token_id": None}, (None, 422)),
    ],
)
def test_tokenizer_opens_texts_as_the_file_says(changes, ids, tmp_path):
    found = tokenizer_of(tmp_path, **changes)
    assert (found.bos_id, found.eos_id) == ids
    assert 420 not in found.encode("text")


def test_tokenizer_puts_no_space_before_texts_where_the_file_says_so(tmp_path):
    found = tokenizer_of(tmp_path, "llama", ggml__add_space_prefix=False)
    assert found.decode(found.encode("a b")) == "a b"
    assert len(found.encode(" a")) >= len(found.encode("a"))
    assert found.encode(" a b") == tokenizer_of(tmp_path, "llama").encode("a b")


WRONG = {
    "none": ({"ggml__model": None}, "tokenizer.ggml.model: None is not supported; expected one of"),
    "another": ({"ggml__model": "bert"}, "tokenizer.ggml.model: 'bert' is not supported"),
    "split": ({"ggml__pre": "deepseek-coder"}, "tokenizer.ggml.pre: 'deepseek-coder' is not supported; expected one"),
    "unsaid split": ({"ggml__pre": None}, "tokenizer.ggml.pre: None is not supported"),
    "no tokens": ({"ggml__tokens": None}, "tokenizer.ggml.tokens: expected an array of str, got None"),
    "numbers": ({"ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens: expected an array of str"),
    "twice": ({"ggml__tokens": ["a", "a"]}, "tokenizer.ggml.tokens: expected tokens, each of them once"),
    "no merges": ({"ggml__merges": None}, "tokenizer.ggml.merges: expected an array"),
    "merge": ({"ggml__merges": ["abc"]}, r"merges: expected two tokens whose merge is one, got \('abc',\)"),
    "unknown merge": ({"ggml__merges": ["zz qq"]}, "merges: expected two tokens whose merge is one"),
    "types": ({"ggml__token_type": [1, 1]}, "tokenizer.ggml.token_type: expected an array of 432 int"),
    "end": ({"ggml__eos_token_id": 432}, "tokenizer.ggml.eos_token_id: expected one of 432 tokens"),
    "start": ({"ggml__bos_token_id": "x"}, "tokenizer.ggml.bos_token_id: expected one of 432 tokens"),
    "opens": ({"ggml__add_bos_token": 1}, "tokenizer.ggml.add_bos_token: expected true or false, got 1"),
    "template": ({"chat_template": 3}, "tokenizer.chat_template: expected a text, got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tokenizer_refuses(name, tmp_path):
    changes, match = WRONG[name]
    with pytest.raises(ValueError, match=match) as error:
        tokenizer_of(tmp_path, **changes)
    assert str(error.value).startswith(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("scores", [None, [1.0]])
def test_tokenizer_refuses_sentencepiece_without_a_score_for_each_piece(scores, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.ggml.scores: expected an array of 420 float"):
        tokenizer_of(tmp_path, "llama", ggml__scores=scores)


def test_tokenizer_files_are_read_by_file_tokenizer(tmp_path, tiny):
    for name, text in gguf.tokenizer_files(gguf_files.GOLDEN / "tiny_llama.gguf").items():
        (tmp_path / name).write_text(text)
    read = FileTokenizer(tmp_path)
    assert read.encode("Hello <tool>") == tiny["llama"].encode("Hello <tool>")


def test_tokenizer_names_its_file_in_errors(tiny):
    with pytest.raises(ValueError, match=r"tiny_qwen2.gguf can't decode"):
        tiny["qwen2"].decode([-1])
