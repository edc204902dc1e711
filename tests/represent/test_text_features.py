"""Features of texts: by BERT and by static embeddings, from Python and by the command."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from subspace_jax import interop, nn, represent
from subspace_jax.cli.main import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "gr", "##ass", "##mann", "manifold", "is", "flat", "not", "."]
TEXTS = ["The Grassmann manifold", " ".join(["grass"] * 30), "", "is not the flat manifold"]


def write_tokenizer(folder, *, processor=True):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if processor:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    made.save(str(folder / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a small BERT with random weights."""
    folder = tmp_path_factory.mktemp("bert") / "model"
    config = nn.BertConfig(len(WORDS), max_length=20, width=8, num_layers=1, num_heads=2, mlp_size=8, pooler=False)
    params = jax.tree.map(lambda x: 10 * x, nn.init_params(jax.random.key(0), config))
    interop.save_bert(folder, config, params)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A folder of static embeddings, not normalized."""
    folder = tmp_path_factory.mktemp("static")
    table = np.random.default_rng(0).normal(size=(len(WORDS), 4)).astype(np.float16)
    interop.write_safetensors(folder / "model.safetensors", {"embedding.weight": (table.shape, table.dtype)}, [table])
    (folder / "modules.json").write_text('[{"idx": 0, "path": "", "type": "models.StaticEmbedding"}]')
    write_tokenizer(folder)
    return folder


def expected(folder, texts):
    """One text at a time, without padding."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(20)
    config, params = interop.load_bert(folder)
    apply, rows = jax.jit(lambda tokens: nn.bert_apply(config, params, tokens).tokens[0]), []
    for text in texts:
        mean = np.asarray(apply(jnp.array([tokenizer.encode(text).ids]))).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def test_features_of_texts_of_bert_do_not_depend_on_padding_or_order(bert):
    model = represent.open_text_model(bert)
    found = represent.features_of_texts(model, TEXTS, batch_size=2)
    chex.assert_trees_all_close(found.features, expected(bert, TEXTS), atol=1e-5)
    assert found.class_names == ("all",)
    turned = represent.features_of_texts(model, TEXTS[::-1], np.arange(4), list("abcd"), batch_size=2)
    chex.assert_trees_all_close(turned.features[::-1], found.features, atol=1e-6)
    assert turned.labels.tolist() == [0, 1, 2, 3]


def test_features_of_texts_of_static_embeddings_are_their_mean(static):
    model = represent.open_text_model(static)
    assert model.prepare("the manifold").tolist() == [4, 8]
    found = represent.features_of_texts(model, ["the manifold", "", "flat flat"])
    table = np.asarray(interop.load_text_encoder(static).params["embed"]["embedding"], np.float32)
    chex.assert_trees_all_close(
        found.features, np.stack([(table[4] + table[8]) / 2, 0 * table[0], table[10]]), atol=1e-6
    )


@pytest.mark.eight_devices
def test_features_of_texts_on_eight_devices_are_those_of_one(bert):
    model = represent.open_text_model(bert)
    assert model.mesh.size == 8
    found = represent.features_of_texts(model, TEXTS, batch_size=3)
    chex.assert_trees_all_close(found.features, expected(bert, TEXTS), atol=1e-5)


def test_read_labelled_texts_reads_lines_and_json(tmp_path):
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbffirst text\r\n\nsecond\n")
    found = represent.read_labelled_texts(tmp_path / "plain.txt")
    assert (found.texts, found.labels.tolist(), found.class_names) == (["first text", "second"], [0, 0], ("all",))
    rows = [{"text": "a", "label": 10}, {"text": "b\n", "label": 9}]
    (tmp_path / "n.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = represent.read_labelled_texts(tmp_path / "n.jsonl")
    assert (found.texts, found.labels.tolist(), found.class_names) == (["a", "b\n"], [1, 0], ("9", "10"))
    (tmp_path / "s.jsonl").write_text('{"text": "a", "label": "no"}\n{"text": "b", "label": "yes", "id": 3}\n')
    assert represent.read_labelled_texts(tmp_path / "s.jsonl").class_names == ("no", "yes")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.txt", b"\n \n", "f.txt: there is no text in it"),
        ("f.txt", b"good\n\xff\xfe\n", "f.txt, line 2: expected UTF-8"),
        ("f.jsonl", b'{"text": "a"}\n{"texts": "b"}', "f.jsonl, line 2: expected a JSON object with text"),
        ("f.jsonl", b'["a"]', "f.jsonl, line 1: expected a JSON object with text"),
        ("f.jsonl", b"plain", "f.jsonl, line 1: expected a JSON object"),
        ("f.jsonl", b'{"text": "a", "label": 1.5}', "line 1: expected a string or an integer as label, got 1.5"),
        ("f.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}', "line 2: expected a label in all lines or in none"),
    ],
)
def test_read_labelled_texts_names_file_and_line(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        represent.read_labelled_texts(tmp_path / name)


def test_open_text_model_refuses_a_tokenizer_that_does_not_fit(bert, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"tokenizer: no file .*tokenizer.json"):
        represent.open_text_model(folder)
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_tokenizer(folder, processor=False)
    with pytest.raises(ValueError, match="expected a tokenizer with a token before and one after a text"):
        represent.open_text_model(folder)
    made = write_tokenizer(folder)
    made.add_tokens(["more"])
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="it has 14 tokens, the model has rows for 13"):
        represent.open_text_model(folder)


def test_features_command_writes_vectors_of_texts_with_their_labels(static, tmp_path, capsys):
    rows = [
        {"text": text, "label": text.split()[-1]} for text in ("the flat", "is flat", "the manifold", "is manifold")
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "t.npz"
    command = ["features", "--quiet", "--model", str(static), "--texts", str(tmp_path / "t.jsonl"), "--out", str(out)]
    assert main(command) == 0
    assert f"Wrote 4 features of width 4, 2 classes, to {out}" in capsys.readouterr().out
    found = represent.read_features(out)
    assert found.class_names == ("flat", "manifold")
    assert found.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resample"], "--resample: is for images, not for --texts"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--texts", "nowhere.txt"], "texts: nowhere.txt: no such file"),
    ],
)
def test_features_command_refuses_what_does_not_go_with_texts(more, message, static, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("flat\n")
    texts = [] if "--texts" in more else ["--texts", str(tmp_path / "t.txt")]
    assert main(["features", "--model", str(static), "--out", str(tmp_path / "t.npz"), *texts, *more]) == 2
    assert message in capsys.readouterr().err
    assert not pathlib.Path(tmp_path / "t.npz").exists()
