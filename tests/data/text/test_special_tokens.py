"""What the files of a folder say of a tokenizer; expected ids are mostly those of transformers 5.24."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from subspace_jax.data import text

VOCAB = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "one": 4, "two": 5, "<|endoftext|>": 6}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def opening(token="<s>", end=""):
    special = [(t, VOCAB[t]) for t in (token, end) if t]
    return processors.TemplateProcessing(single=f"{token} $A {end}".strip(), special_tokens=special)


@pytest.fixture
def load(tmp_path):
    """Writes a folder with a tokenizer of words, and reads it."""

    def load(change=lambda tokenizer: None, vocab=VOCAB, **files):
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        change(tokenizer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, fields in files.items():
            (tmp_path / f"{name}.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
        return text.load_tokenizer(tmp_path)

    return load


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.enable_truncation(1),
        lambda t: t.enable_truncation(2, stride=1, direction="left"),
        lambda t: t.enable_padding(length=12, pad_id=3, pad_token="<pad>"),
        lambda t: t.enable_padding(pad_to_multiple_of=8, direction="left"),
    ],
)
def test_stored_truncation_and_padding_touch_no_text(load, change):
    tokenizer = load(change, tokenizer_config=NAMES)
    assert tokenizer.encode("one two one") == [4, 5, 4]
    assert tokenizer.encode_pair("one", " two one") == ([4], [5, 4])
    assert text.encode(text.Completion("", "one two one"), tokenizer)[0].tolist() == [1, 4, 5, 4, 2]


def test_stored_dropout_leaves_nothing_to_chance(tmp_path):
    letters = {c: i for i, c in enumerate("abcd")} | {"ab": 4, "cd": 5, "abcd": 6}
    model = models.BPE(letters, [("a", "b"), ("c", "d"), ("ab", "cd")], dropout=0.9)
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = text.load_tokenizer(tmp_path)
    assert all(tokenizer.encode("abcd") == [6] for _ in range(20))


def processor(value):
    return lambda tokenizer: setattr(tokenizer, "post_processor", value)


byte_level = processors.ByteLevel(trim_offsets=False)


@pytest.mark.parametrize(
    ("change", "config", "expected"),
    [
        # The post-processor of tokenizer.json has the word, whatever the config says, and nothing comes twice.
        (processor(opening()), NAMES, [1, 4, 2]),
        (processor(opening()), {**NAMES, "add_bos_token": True}, [1, 4, 2]),
        (processor(opening()), {**NAMES, "add_bos_token": False}, [1, 4, 2]),
        (processor(opening()), {**NAMES, "bos_token": None}, [1, 4, 2]),
        (processor(opening("<|endoftext|>")), NAMES, [6, 4, 2]),
        (processor(opening(end="</s>")), NAMES, [1, 4, 2]),
        (processor(opening(end="</s>")), {}, [1, 4, 2]),
        (processor(processors.Sequence([byte_level, opening()])), NAMES, [1, 4, 2]),
        (processor(byte_level), NAMES, [4, 2]),
        (processor(processors.TemplateProcessing(single="$A", special_tokens=[])), NAMES, [4, 2]),
        # Without one, the config and the class.
        (processor(None), NAMES, [1, 4, 2]),
        (processor(None), {**NAMES, "add_bos_token": None}, [1, 4, 2]),
        (processor(None), {**NAMES, "add_bos_token": False}, [4, 2]),
        (processor(None), {**NAMES, "tokenizer_class": "LlamaTokenizerFast"}, [1, 4, 2]),
        (processor(None), {**NAMES, "tokenizer_class": "GPT2Tokenizer"}, [4, 2]),
        (processor(None), {**NAMES, "tokenizer_class": "Qwen2TokenizerFast"}, [4, 2]),
        (processor(None), {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}, [4, 2]),
        (processor(None), {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, [1, 4, 2]),
        (processor(None), {"eos_token": "</s>", "bos_token": None}, [4, 2]),
        # Names that a class has by itself.
        (processor(byte_level), {"tokenizer_class": "GPT2Tokenizer"}, [4, 6]),
        (processor(None), {"tokenizer_class": "LlamaTokenizer"}, [1, 4, 2]),
        (processor(None), {"tokenizer_class": "LlamaTokenizer", "eos_token": None}, [1, 4]),
    ],
)
def test_texts_open_and_end_with_the_right_tokens(load, change, config, expected):
    tokenizer = load(change, tokenizer_config=config)
    assert text.encode(text.Completion("", "one"), tokenizer)[0].tolist() == expected


def test_gpt2_and_qwen2_folders_without_names_have_those_of_their_family(load):
    assert load(processor(byte_level), config={"model_type": "gpt2"}).eos_id == 6
    qwen2 = load(processor(byte_level), config={"model_type": "qwen2"})
    assert (qwen2.bos_id, qwen2.eos_id, qwen2.pad_id) == (None, 6, 6)
    assert load(processor(None), config={"model_type": "llama"}).eos_id is None


def test_the_class_may_stand_in_the_config_of_the_model(load):
    config = {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}
    tokenizer = load(config=config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 6)
    tokenizer = load(config=config, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("as_object", [False, True])
def test_names_may_stand_in_the_special_tokens_map_and_be_objects(load, as_object):
    names = {k: {"content": v, "lstrip": False, "normalized": False} for k, v in NAMES.items()} if as_object else NAMES
    for files in (
        {"tokenizer_config": {}, "special_tokens_map": names},
        {"tokenizer_config": {"eos_token": "<pad>"}, "special_tokens_map": names},
        {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": names},
        {"tokenizer_config": {**names, "added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<pad>"}},
    ):
        tokenizer = load(**files)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


def test_named_tokens_are_cut_out_of_texts_and_no_part_of_decoded_ones(load):
    tokenizer = load(tokenizer_config={**NAMES, "additional_special_tokens": ["<|endoftext|>"]})
    assert tokenizer.encode("one</s>two <|endoftext|>") == [4, 2, 5, 6]
    assert tokenizer.decode([1, 4, 6, 5, 2, 3]) == "one two"
    # "split_special_tokens" takes them for text like any other.
    tokenizer = load(tokenizer_config={**NAMES, "split_special_tokens": True})
    assert tokenizer.encode("one</s>two") == [4, 0, 0, 0, 5]


def test_tokens_that_other_files_add_are_known(load):
    token = {"content": "<new>", "lstrip": True, "special": False}
    for files in ({"tokenizer_config": {"added_tokens_decoder": {"7": token}}}, {"added_tokens": {"<new>": 7}}):
        tokenizer = load(**{"tokenizer_config": {}, **files})
        assert tokenizer.encode("one<new>two") == [4, 7, 5]
        assert tokenizer.vocab_size == 8
        (tokenizer._file.parent / "added_tokens.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="give '<new>' the id 9, which is not the next one"):
        load(tokenizer_config={"added_tokens_decoder": {"9": token}})


def test_the_prefix_space_of_gpt2_is_that_of_its_config(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE({"Ġ": 0, "a": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for config, expected in (
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, [0, 1]),
        ({"tokenizer_class": "GPT2Tokenizer"}, [1]),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, [1]),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert text.load_tokenizer(tmp_path).encode("a") == expected


@pytest.mark.slow  # The tokenizers library counts up to the largest id.
def test_the_largest_id_counts_not_the_number_of_tokens(load):
    tokenizer = load(vocab={"<unk>": 0, "one": 4, "two": 500}, tokenizer_config={})
    assert tokenizer.vocab_size == 501
    text.check_vocabulary(tokenizer, 501)
    with pytest.raises(ValueError, match=r"the model has rows for 500 \(the largest id is 500\);"):
        text.check_vocabulary(tokenizer, 500)
    added = load(lambda t: t.add_special_tokens(["<more>"]), vocab={"<unk>": 0, "two": 500}, tokenizer_config={})
    assert added.vocab_size == 1 + max(500, *added.encode("<more>"))
    with pytest.raises(ValueError, match=r"expected ids below 2\^31"):
        load(vocab={"<unk>": 0, "two": 2**31}, tokenizer_config={})


SPACES = {c: i for i, c in enumerate("▁:QyesnAo")} | {"▁yes": 20, "yes": 21, "ye": 22, "▁Q": 23}
MERGES = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("▁", "Q")]


@pytest.fixture(params=["prepend", "metaspace"])
def sentencepiece(request, tmp_path):
    """As Llama's: a space stands before every text, and is cut off the first token that is decoded."""
    tokenizer = tokenizers.Tokenizer(models.BPE(SPACES, MERGES, fuse_unk=True))
    if request.param == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return text.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {" yes": [0, 20], "Q</s>yes": [23, 30, 20]}),  # as tokenizer.json has it
        ({"tokenizer_class": "LlamaTokenizerFast"}, {" yes": [20], "Q</s>yes": [23, 30, 21], "yes ": [20, 0]}),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, {" yes": [20], "Q</s>yes": [23, 30, 20]}),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, {"yes": [21], " yes": [20]}),
        ({"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}, {" yes": [20], "Q</s>yes": [23, 30, 21]}),
    ],
)
def test_spaces_are_those_of_llamas_class(tmp_path, config, expected):
    tokenizer = tokenizers.Tokenizer(models.BPE({**SPACES, "</s>": 30}, MERGES, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([tokenizers.AddedToken("</s>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = text.load_tokenizer(tmp_path)
    assert {sample: tokenizer.encode(sample) for sample in expected} == expected
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')  # which transformers reads by no such class
    assert text.load_tokenizer(tmp_path).encode(" yes") == [0, 20]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q:", "yes", ([23, 1], [21])),
        ("Q:", " yes", ([23, 1], [20])),
        ("Q: ", "yes", ([23, 1], [20])),  # the token that holds the completion's first character is its own
        ("Q:y", "es", ([23, 1], [21])),
        ("", "yes", ([], [20])),
        ("Q:", "", ([23, 1], [])),
        ("", "", ([], [])),
    ],
)
def test_a_completion_is_encoded_with_its_prompt(sentencepiece, prompt, completion, expected):
    assert sentencepiece.encode_pair(prompt, completion) == expected
    tokens, learnt = text.encode(text.Completion(prompt, completion), sentencepiece)
    assert (tokens[~learnt].tolist(), tokens[learnt].tolist()) == expected


@pytest.mark.parametrize(("prompt", "options"), [("Q: ", ("yes", "no")), ("Q:", (" yes", " no"))])
def test_options_are_encoded_with_their_question_and_compared_from_the_same_prompt(sentencepiece, prompt, options):
    rows = text.choice_rows([text.Choice(prompt, options, 0)], sentencepiece, 8)
    assert rows["weights"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]
    assert rows["labels"][:, :4].tolist() == [[1, 20, 0, 0], [1, 0, 6, 8]]


def test_options_without_a_token_of_their_own_are_refused(sentencepiece):
    for prompt, options in (("Q:", ("yes", "")), ("", ("yes", "yes no"))):
        with pytest.raises(ValueError, match=r"question 0: option \d has no token after the first one"):
            text.choice_rows([text.Choice(prompt, options, 0)], sentencepiece, 8)


def test_a_decoded_continuation_keeps_its_space(sentencepiece):
    prompt = sentencepiece.encode("Q:")
    assert sentencepiece.decode([20]) == "yes"
    assert text.decode_continuation(sentencepiece, prompt, [20, 21]) == " yesyes"
    assert text.decode_continuation(sentencepiece, [], [20]) == "yes"
    assert text.decode_continuation(sentencepiece, prompt, []) == ""


def test_a_character_begun_by_a_prompt_is_decoded_with_its_end():
    tokenizer = text.ByteTokenizer()
    first, *rest = "é!".encode()
    assert text.decode_continuation(tokenizer, [97, first], rest) == "é!"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": "["}, r"tokenizer_config\.json: not JSON"),
        ({"tokenizer_config": "[" * 100_000}, r"tokenizer_config\.json: not JSON"),
        ({"tokenizer_config": [1]}, r"tokenizer_config\.json: expected a JSON object, got list"),
        ({"special_tokens_map": "{"}, r"special_tokens_map\.json: not JSON"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token: expected a token, got '3'"),
        ({"tokenizer_config": {"eos_token": {"content": None}}}, "eos_token: expected a token"),
        (
            {"tokenizer_config": {"additional_special_tokens": ["\ud800"]}},
            r"tokenizer_config\.json or .*: additional_special_tokens: expected a token",
        ),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, "eos_token: expected a token"),
        ({"tokenizer_config": {"add_bos_token": "false"}}, "add_bos_token: expected true or false, got 'false'"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder: expected tokens by their ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": 1}}}, "added_tokens_decoder: 7: expected a token"),
        ({"added_tokens": {"<new>": "7"}}, r"added_tokens\.json: '<new>': expected an id, got '7'"),
        ({"special_tokens_map": {"pad_token": "<none>"}}, "pad_token '<none>' .* is no token of"),
    ],
)
def test_damaged_files_are_named(load, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(**files)
    assert "\n" not in str(caught.value)


def test_two_tokens_before_a_text_are_refused(load):
    double = processors.TemplateProcessing(single="<s> <pad> $A", special_tokens=[("<s>", 1), ("<pad>", 3)])
    with pytest.raises(ValueError, match=r"expected at most one token before a text, got \[1, 3\]"):
        load(processor(double), tokenizer_config=NAMES)


def test_a_panic_of_the_library_becomes_one_line(load, tmp_path):
    load(processor(opening()), tokenizer_config=NAMES)
    file = tmp_path / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["post_processor"]["special_tokens"] = {}
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        text.load_tokenizer(tmp_path)


def test_texts_that_have_no_tokens_are_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"one": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = text.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json can't encode 'two'"):
        tokenizer.encode("two")
    for some in (tokenizer, text.ByteTokenizer()):
        with pytest.raises(ValueError, match="character 2: expected Unicode text"):
            some.encode("ab\ud800")
