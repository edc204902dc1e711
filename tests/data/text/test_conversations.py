import json

import pyarrow
import pyarrow.parquet
import pytest

from subspace_jax.data import text

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def written(tmp_path, *rows, name="some.jsonl"):
    file = tmp_path / name
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_are_recognised_by_their_fields(tmp_path):
    pair = {"prompt": "p", "completion": "c", "text": "pc", "id": 3}
    assert text.read_texts(written(tmp_path, pair)) == [("p", "c")]
    assert text.read_texts(written(tmp_path, {"text": "t", "prompt": "p"})) == [("", "t")]
    assert text.read_texts(written(tmp_path, pair), completion="text") == [("", "pc")]
    file = written(tmp_path, {"messages": HELLO, "text": "t"}, "\n", {"messages": HELLO, "tools": []})
    assert text.read_texts(file) == [
        text.Conversation(tuple(HELLO), None, f"{file}, line 1"),
        text.Conversation(tuple(HELLO), None, f"{file}, line 3"),
    ]


def test_parquet_files_hold_conversations_without_the_fields_that_are_null(tmp_path):
    file = tmp_path / "some.parquet"
    rows = [{"messages": [{"role": "user", "content": "Hi", "name": None}, HELLO[1]], "id": 1}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = text.read_texts(file)
    assert [given.messages for given in found] == [tuple(HELLO)] * 2
    assert found[1].where == f"{file}, row 1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi"}, "field 'messages': expected a list of messages, got str"),
        ({"messages": []}, "field 'messages': expected a list of messages, got an empty list"),
        ({"messages": ["Hi"]}, r"messages\[0\]: expected an object with 'role' and 'content', got str"),
        ({"messages": [*HELLO, {"from": "gpt"}]}, r"messages\[2\]: no field 'role'; there are \['from'\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: no field 'content'; there are \['role'\]"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: field 'content': expected text, got null"),
        ({"messages": [{"role": "user", "content": [{}]}]}, r"messages\[0\]: field 'content': expected text, got list"),
        ({"messages": [{"role": 1, "content": "a"}]}, r"messages\[0\]: field 'role': expected text, got int"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "expected Unicode text, got '.ud800'"),
        ({"messages": HELLO, "tools": "none"}, "field 'tools': expected a list of objects, got str"),
        ({"text": "Hi"}, r"no field 'messages', which every row must have; there are \['text'\]"),
    ],
)
def test_malformed_messages_are_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: {message}"):
        text.read_texts(written(tmp_path, {"messages": HELLO}, row))


def test_rows_of_another_kind_than_the_first_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 2: no field 'completion'; there are \['prompt'\]"):
        text.read_texts(written(tmp_path, {"prompt": "p", "completion": "c"}, {"prompt": "p"}))
    with pytest.raises(ValueError, match=r"line 1: no field 'text'; .* expected 'messages', or 'prompt' and 'comp"):
        text.read_texts(written(tmp_path, {"prompt": "p", "answer": "c"}))


def test_messages_with_tool_calls_need_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    found = text.conversation_of({"messages": [HELLO[0], call], "tools": [{"name": "f"}]}, "row")
    assert found.messages[1] == {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert found.tools == ({"name": "f"},)
