import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from subspace_jax.data import text


@given(st.text(max_size=40))
def test_bytes_give_back_any_text(sample):
    tokenizer = text.ByteTokenizer()
    tokens = tokenizer.encode(sample)
    assert tokenizer.decode([tokenizer.bos_id, *tokens, tokenizer.eos_id, tokenizer.pad_id]) == sample
    assert all(0 <= t < 256 for t in tokens)


def test_a_text_that_is_cut_inside_a_character_is_decoded():
    assert text.ByteTokenizer().decode("é".encode()[:1]) == "\ufffd"


@pytest.fixture
def folder(tmp_path):
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "subspace": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None})
    )
    return tmp_path


def test_a_folder_gives_its_tokenizer_with_its_special_tokens(folder):
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = text.load_tokenizer(path)
        assert tokenizer.encode("a subspace here") == [3, 4, 2]
        assert tokenizer.decode([0, 3, 4, 1]) == "a subspace"
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (5, 0, 1, 1)


def test_without_a_config_there_are_no_special_tokens(folder):
    (folder / "tokenizer_config.json").unlink()
    tokenizer = text.load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, 0)


def test_what_is_no_tokenizer_is_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no file .*tokenizer\.json"):
        text.load_tokenizer(folder / "elsewhere" / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(ValueError, match="eos_token '<end>'"):
        text.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        text.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer"):
        text.load_tokenizer(folder)


def test_a_model_with_too_few_rows_is_refused():
    text.check_vocabulary(text.ByteTokenizer(), 259)
    with pytest.raises(ValueError, match="it has 259 tokens, the model has rows for 256"):
        text.check_vocabulary(text.ByteTokenizer(), 256)


def test_stream_continuation_gives_whole_characters_that_make_the_text():
    tokenizer = text.ByteTokenizer()
    prompt, new = tokenizer.encode("où "), tokenizer.encode("é東🙂 fin")
    pieces = list(text.stream_continuation(tokenizer, prompt, iter(new)))
    assert pieces[:3] == ["é", "東", "🙂"]
    assert "".join(pieces) == text.decode_continuation(tokenizer, prompt, new) == "é東🙂 fin"
    assert list(text.stream_continuation(tokenizer, prompt, new[:3])) == ["é", "\ufffd"]


def test_encode_with_offsets_tells_the_characters_of_each_token(folder):
    for tokenizer, sample, places in (
        (text.load_tokenizer(folder), "a subspace  a", [(0, 1), (2, 10), (12, 13)]),
        (text.ByteTokenizer(), "aé", [(0, 1), (1, 2), (1, 2)]),
    ):
        assert tokenizer.encode_with_offsets(sample) == (tokenizer.encode(sample), places)
