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
        ('{"text": "a"}\n{"text": NaN}', "line 2: field 'text': expected text, got float"),
        ('{"text": null}', "line 1: field 'text': expected text, got NoneType"),
        ('{"text": "a"}\n' + "[" * 100_000, "line 2: expected a JSON object .*recursion"),
        (b'{"text": "a"}\n{"text": "\xe9"}', "line 2: expected UTF-8, got '.udce9'"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: expected UTF-8"),
        ('{"text": "\\ud800"}', "line 1: field 'text': expected Unicode text, got '.ud800' at character 0"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, content, message):
    file = tmp_path / "some.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        text.read_texts(file)
    assert str(file) in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.jsonl", '{"text": "one"}\r\n'), ("a.txt", "one"), ("a.JSONL", '{"text": "one"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert text.read_texts(tmp_path / name) == [("", "one")]


def test_plain_text_that_is_no_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "some.txt").write_bytes(b"one\n\ntwo\n\xff")
    with pytest.raises(ValueError, match=r"some\.txt, line 4: expected UTF-8"):
        text.read_texts(tmp_path / "some.txt")


@pytest.mark.parametrize("name", ["some.json", "some.csv", "some.jsonl.gz", "some.ZIP"])
def test_other_kinds_of_files_are_no_plain_text(tmp_path, name):
    (tmp_path / name).write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match=r"expected a \.jsonl, \.parquet or plain-text file, got"):
        text.read_texts(tmp_path / name)


def test_damaged_parquet_files_and_their_columns_are_named(tmp_path):
    file = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 99, "n": range(99), "b": [b"x"] * 99}), file)
    for field, message in (
        ("txt", r"some\.parquet: no field 'txt'; there are \['b', 'n', 'text'\]"),
        ("n", r"some\.parquet, row 0: field 'n': expected text, got int"),
        ("b", r"some\.parquet, row 0: field 'b': expected text, got bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            text.read_texts(file, completion=field)
    whole = file.read_bytes()
    for cut in (whole[:-9], whole[: len(whole) // 2], whole[:40] + b"\xff" * 40 + whole[80:], b"PAR1" * 3):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=r"some\.parquet: it is no Parquet file, or a damaged one") as caught:
            text.read_texts(file)
        assert "\n" not in str(caught.value)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl"):
        text.read_texts(tmp_path / "none.jsonl")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no file .*trian\.jsonl; did you mean train\.jsonl\?"):
        text.read_texts(tmp_path / "trian.jsonl")
    with pytest.raises(FileNotFoundError, match=r"expected a file of text, got the folder .*; it holds train\.jsonl"):
        text.read_texts(tmp_path)
    (tmp_path / "some.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"some\.parquet: it is no Parquet file"):
        text.read_texts(tmp_path / "some.parquet")


def test_a_changed_byte_in_a_parquet_file_with_checksums_is_found(tmp_path):
    file, table = tmp_path / "some.parquet", pyarrow.table({"text": [f"text {i}" for i in range(99)]})
    pyarrow.parquet.write_table(
        table, file, write_page_checksum=True, use_dictionary=False, compression="none", column_encoding="PLAIN"
    )
    whole = file.read_bytes()
    at = whole.index(b"text 50")
    file.write_bytes(whole[:at] + b"T" + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"some\.parquet: it is no Parquet file, or a damaged one .*CRC"):
        text.read_texts(file)


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


def test_unknown_sets_and_unprepared_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of the sets ai2_arc, .*, gsm8k, got 'squad'$"):
        text.tfds_texts("squad", "train")
    with pytest.raises(ValueError, match=r"got 'gms8k'; did you mean gsm8k\?"):
        text.tfds_texts("gms8k", "train")
    with pytest.raises(FileNotFoundError, match="'e2e_cleaned' is not prepared under"):
        text.tfds_texts("e2e_cleaned", "train", str(tmp_path))


def test_records_that_are_not_as_expected_and_empty_splits_are_named(monkeypatch):
    from subspace_jax.data.text import records

    info = SimpleNamespace(features=LABELS)
    for record, found in (({"question": b"a"}, "KeyError"), ({"question": b"a", "answer": 3, "x": 1}, None)):
        monkeypatch.setattr(records, "open_records", lambda *_, record=record: ([record], info))
        if found is None:
            assert text.tfds_texts("gsm8k", "train") == [("Question: a\nAnswer: ", "3")]
            continue
        with pytest.raises(ValueError, match=f"gsm8k, split train, record 0: .*{found}"):
            text.tfds_texts("gsm8k", "train")
    monkeypatch.setattr(records, "open_records", lambda *_: ([], info))
    with pytest.raises(ValueError, match="split: 'train' of 'gsm8k' is empty"):
        text.tfds_texts("gsm8k", "train")
