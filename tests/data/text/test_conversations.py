import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from subspace_jax.data import text

REPOSITORY = pathlib.Path(__file__).parents[3]
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def written(tmp_path, *rows, name="some.jsonl"):
    file = tmp_path / name
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


TEXT = {"type": "text", "text": "Hi"}


def part(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


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
        ({"messages": [{"role": "user", "content": 0}]}, r"messages\[0\]: field 'content': expected text, got int"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]: field 'content': expected text, got int"),
        (part(), r"messages\[0\]: content: expected a text, or parts of the type 'text', got an empty list"),
        (part({}), r"messages\[0\]: content\[0\]: expected a part of the type 'text', got the type None"),
        (part("Hi"), r"messages\[0\]: content\[0\]: expected a part of the type 'text', got str"),
        (part(TEXT, {"type": "image_url"}), r"messages\[0\]: content\[1\]: expected .* got the type 'image_url'"),
        (part({"type": "text"}), r"messages\[0\]: content\[0\]: field 'text': expected text, got NoneType"),
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


def test_contents_in_parts_are_joined(tmp_path):
    row = part(TEXT, {"type": "text", "text": " there", "image": None})
    for name in ("some.jsonl", "some.parquet"):
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
        else:
            written(tmp_path, row)
        [found] = text.read_texts(tmp_path / name)
        assert found.messages == ({"role": "user", "content": "Hi there"},)


def test_lists_of_messages_as_prompt_and_completion_are_conversations(tmp_path):
    row = {"prompt": [HELLO[0]], "completion": [HELLO[1]], "tools": [{"name": "f"}]}
    file = written(tmp_path, row)
    wanted = text.Conversation(tuple(HELLO), ({"name": "f"},), f"{file}, line 1", 1)
    assert text.read_texts(file) == [wanted]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "some.parquet")
    assert text.read_texts(tmp_path / "some.parquet") == [wanted._replace(where=f"{tmp_path / 'some.parquet'}, row 0")]
    file = written(tmp_path, {"q": [HELLO[0]], "chat": HELLO})
    [found] = text.read_texts(file, completion="chat")
    assert (found.messages, found.prompt_length) == (tuple(HELLO), 0)
    [found] = text.read_texts(file, prompt="q", completion="chat")
    assert (found.messages, found.prompt_length) == ((HELLO[0], *HELLO), 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": HELLO}, "field 'prompt': expected a list of messages, got str"),
        ({"prompt": HELLO, "completion": "c"}, "field 'completion': expected a list of messages, got str"),
        ({"prompt": [], "completion": HELLO}, "field 'prompt': expected a list of messages, got an empty list"),
        ({"prompt": HELLO}, r"no field 'completion', which every row must have; there are \['prompt'\]"),
        ({"prompt": HELLO, "completion": ["c"]}, r"completion\[0\]: expected an object with 'role' and 'content', got"),
    ],
)
def test_malformed_prompts_and_completions_are_named_with_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"some\.jsonl, line 2: {message}"):
        text.read_texts(written(tmp_path, {"prompt": HELLO[:1], "completion": HELLO[1:]}, row))


def test_a_file_holds_conversations_by_its_first_row(tmp_path):
    for row, holds in (
        ({"messages": HELLO}, True),
        ({"prompt": HELLO[:1], "completion": HELLO[1:]}, True),
        ({"prompt": "p", "completion": "c"}, False),
        ({"text": "t"}, False),
    ):
        assert text.holds_conversations(written(tmp_path, row, "no JSON\n")) is holds
    assert text.holds_conversations(written(tmp_path, {"text": "t", "chat": HELLO}), completion="chat")
    assert not text.holds_conversations(written(tmp_path, "a text", name="some.txt"))
    assert not text.holds_conversations(written(tmp_path))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"messages": [{"from": "human", "value": "Hi"}]},
    ],
)
def test_errors_of_sharegpt_and_alpaca_rows_name_the_recipe(tmp_path, row):
    recipe = r"line 1: .*; docs/language.md converts such rows under 'ShareGPT and Alpaca'$"
    with pytest.raises(ValueError, match=recipe):
        text.read_texts(written(tmp_path, row))
    assert "**ShareGPT and Alpaca.**" in (REPOSITORY / "docs" / "language.md").read_text()


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": "Wait."}])
def test_messages_with_tool_calls_need_no_content_and_null_stays_for_the_template(content):
    call = {"role": "assistant", **content, "tool_calls": [{"function": {"name": "f"}}]}
    found = text.conversation_of({"messages": [HELLO[0], {**call, "name": None}], "tools": [{"name": "f"}]}, "row")
    assert found.messages[1] == call
    assert found.tools == ({"name": "f"},)
