import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from subspace_jax.data import text


def test_plain_text_is_split_at_empty_lines(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("one\ntwo\n\n\n\nthree\n")
    assert text.read_texts(file) == [("", "one\ntwo"), ("", "three")]


def test_jsonl_and_parquet_give_prompts_and_completions(tmp_path):
    rows = [{"q": "1 + 1", "a": "2"}, {"q": "é", "a": "x"}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet")
    for name in ("some.jsonl", "some.parquet"):
        assert text.read_texts(tmp_path / name, prompt="q", completion="a") == [("1 + 1", "2"), ("é", "x")]
        assert text.read_texts(tmp_path / name, completion="a") == [("", "2"), ("", "x")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"some\.jsonl: there is no text in it"),
        ('{"text": "a"}\n{"text": ', r"some\.jsonl, line 2: expected a JSON object"),
        ('{"text": "a"}\n\n[1]', r"line 3: expected a JSON object, got list"),
        ('{"txt": "a"}', r"line 1: no field 'text'; there are \['txt'\]"),
        ('{"text": 3}', "line 1: field 'text': expected text, got int"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, content, message):
    file = tmp_path / "some.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        text.read_texts(file)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl"):
        text.read_texts(tmp_path / "none.jsonl")
    (tmp_path / "some.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"some\.parquet: it is no Parquet file"):
        text.read_texts(tmp_path / "some.parquet")


LABELS = {"sentence1": None, "sentence2": None, "idx": None, "label": SimpleNamespace(names=["no", "yes"])}


@pytest.mark.parametrize(
    ("name", "record", "wanted"),
    [
        (
            "gem/e2e_nlg:1.1.0",
            {"meaning_representation": b"name[Aromi]", "target": b"Aromi is here."},
            ("name[Aromi] || ", "Aromi is here."),
        ),
        (
            "e2e_cleaned",
            {
                "input_text": {"table": {"column_header": [b"name", b"food"], "content": [b"Aromi", b"English"]}},
                "target_text": b"Aromi.",
            },
            ("name[Aromi], food[English] || ", "Aromi."),
        ),
        ("gsm8k", {"question": b"1?", "answer": b"#### 1"}, ("Question: 1?\nAnswer: ", "#### 1")),
        (
            "ai2_arc/ARC-Easy",
            {"question": b"Why?", "choices": {"label": [1, 0], "text": [b"a", b"b"]}, "answerKey": 0},
            ("Question: Why?\nAnswer: ", ("a", "b"), 1),
        ),
        (
            "glue/mrpc",
            {"sentence1": b"s", "sentence2": b"t", "idx": 3, "label": 0},
            ("sentence1: s\nsentence2: t\nlabel: ", ("no", "yes"), 0),
        ),
    ],
)
def test_records_of_known_sets_become_examples(name, record, wanted):
    assert text.mapping_of(name)(record, LABELS) == wanted


def test_sets_without_a_mapping_and_unprepared_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no mapping for 'squad'; there are mappings for"):
        text.tfds_texts("squad", "train")
    with pytest.raises(FileNotFoundError, match="'e2e_cleaned' is not prepared under"):
        text.tfds_texts("e2e_cleaned", "train", str(tmp_path))
