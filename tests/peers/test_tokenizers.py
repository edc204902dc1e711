"""Ids of folders with mutated settings against transformers' AutoTokenizer, by ``make test-peers``."""

import importlib.util
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from subspace_jax.data import text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the peers come with the extra bench"),
]

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<|endoftext|>"]
CORPUS = ["the quick brown fox. Answer: yes no 123 ünïcödé 日本語 \n\n\t"] * 20
SAMPLES = [
    "",
    " ",
    " the fox ",
    "the  quick\n\nfox",
    "a</s>b",
    "the <s> fox</s> no",
    "ünï 日本語 🙂",
    "a<new>b",
    "Answer: ",
]


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)


def sentencepiece():
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=pieces)


def unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>")


def words():
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL)


CLASSES = {
    byte_level: (None, "PreTrainedTokenizerFast", "GPT2Tokenizer"),
    sentencepiece: (None, "TokenizersBackend", "LlamaTokenizer"),
    unigram: (None, "TokenizersBackend"),
    words: (None, "PreTrainedTokenizerFast"),
}


def change(tokenizer, rng):
    """Stores what a run may leave in tokenizer.json."""
    opening = lambda single: processors.TemplateProcessing(  # noqa: E731
        single=single, special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    trim = processors.ByteLevel(trim_offsets=True)
    options = [opening("<s> $A"), opening("<s> $A </s>"), trim, processors.Sequence([trim, opening("<s> $A")]), None]
    if (processor := rng.choice(options)) is not None:
        tokenizer.post_processor = processor
    if rng.random() < 0.3:
        tokenizer.enable_truncation(3)
    if rng.random() < 0.3:
        tokenizer.enable_padding(length=12, pad_id=2, pad_token="<pad>")


def settings(classes, largest, rng):
    """Draws the other files of a folder."""
    as_object = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    roles = [role for role in ("bos_token", "eos_token", "pad_token", "unk_token") if rng.random() < 0.7]
    names = {role: rng.choice([*SPECIAL, {"content": rng.choice(SPECIAL), **as_object}, None]) for role in roles}
    config = {"tokenizer_class": rng.choice(classes)}
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy"):
        if rng.random() < 0.3:
            config[name] = rng.random() < 0.5
    if rng.random() < 0.3:
        config["additional_special_tokens"] = [rng.choice(SPECIAL)]
    files = {"special_tokens_map.json": names}
    if rng.random() < 0.5:
        marked = {role: {"__type": "AddedToken", **n} if isinstance(n, dict) else n for role, n in names.items()}
        files = {"tokenizer_config.json": {**config, **marked}}
    if rng.random() < 0.3:
        files["added_tokens.json"] = {"<new>": largest + 1}
    files.setdefault("tokenizer_config.json", config)
    # A class that is not named is left out, as in older folders.
    if files["tokenizer_config.json"]["tokenizer_class"] is None:
        del files["tokenizer_config.json"]["tokenizer_class"]
    return files


@pytest.mark.parametrize("kind", CLASSES)
def test_ids_are_those_of_transformers(kind, tmp_path):
    import transformers

    transformers.logging.set_verbosity_error()
    trained, trainer = kind()
    trained.train_from_iterator(CORPUS, trainer)
    rng = random.Random(0)
    for number in range(40):
        tokenizer = tokenizers.Tokenizer.from_str(trained.to_str())
        change(tokenizer, rng)
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        files = settings(CLASSES[kind], max(tokenizer.get_vocab().values()), rng)
        for name, fields in files.items():
            (folder / name).write_text(json.dumps(fields))
        ours, theirs = text.load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.vocab_size == 1 + max(theirs.get_vocab().values()), files
        for sample in SAMPLES:
            ids = theirs.encode(sample, add_special_tokens=False)
            assert ours.encode(sample) == ids, (files, sample)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), (files, sample)
            if tokenizer.post_processor is not None:
                opened = ids if ours.bos_id is None else [ours.bos_id, *ids]
                assert theirs.encode(sample)[: len(opened)] == opened, (files, sample)
        if theirs.eos_token_id is not None:
            assert ours.eos_id == theirs.eos_token_id, files
