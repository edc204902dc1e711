"""Chat templates against transformers.

``tests/golden/chat`` holds templates in the form of published ones, a byte-level BPE of 330 tokens trained on the
conversations, and what ``apply_chat_template`` of transformers 5.24 (tokenizers 0.23.3) gives for them, with its clock
at 26 July 2024: texts with and without the generation prompt, tokens, and assistant masks where a template has
``{% generation %}`` blocks.
"""

import datetime
import json
import pathlib

import pytest

from subspace_jax.data import text

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "chat"
RENDERED = json.loads((GOLDEN / "rendered.json").read_text())
TOKENIZER = text.load_tokenizer(GOLDEN)
USER, YES = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}


def template_of(name):
    return text.load_chat_template(TOKENIZER, GOLDEN / f"{name}.jinja", date=datetime.date(2024, 7, 26))


TEMPLATES = {name: template_of(name) for name in ("chatml", "inst", "headers", "generation", "reasoning")}


def parts(passage):
    return [passage.text[start:stop] for start, stop in passage.spans]


def conversation(*said, where="chat.jsonl, line 3"):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(said))
    return text.Conversation(messages, None, where)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_texts_are_those_of_transformers(name):
    cases = [case for case in RENDERED["cases"] if case["template"] == name]
    assert len(cases) >= 5
    for case in cases:
        given = text.conversation_of(case, "golden")
        rendered = [
            TEMPLATES[name].render(given.messages, tools=given.tools, add_generation_prompt=prompt)
            for prompt in (False, True)
        ]
        assert rendered == [case["text"], case["with_prompt"]]
        assert TOKENIZER.encode(rendered[0]) == case["tokens"]


def test_generation_blocks_give_the_assistant_masks_of_transformers():
    for case in RENDERED["cases"]:
        if case["template"] == "generation":
            [passage] = TEMPLATES["generation"].passages(text.conversation_of(case, "golden"))
            tokens, in_loss = text.encode(passage, TOKENIZER)
            assert tokens.tolist() == case["tokens"]
            assert in_loss.astype(int).tolist() == case["mask"]


def test_prefixes_give_each_reply_with_the_end_of_its_turn():
    chat = conversation("Hi", "One", "And?", "\nTwo ", "Bye")
    for name, replies in (
        ("chatml", ["One<|im_end|>\n", "\nTwo <|im_end|>\n"]),
        ("inst", [" One</s>", " Two</s>"]),
        ("headers", ["One<|eot|>", "Two<|eot|>"]),
    ):
        [passage] = TEMPLATES[name].passages(chat)
        assert passage.text == TEMPLATES[name].render(chat.messages)
        assert parts(passage) == replies


def test_replies_are_texts_of_their_own_where_the_template_changes_earlier_ones():
    chat = conversation("2 + 2?", "<think>\nsum\n</think>\n\nFour", "3 + 3?", "<think>\nagain\n</think>\n\nSix")
    first, second = TEMPLATES["reasoning"].passages(chat)
    assert parts(first) == ["<think>\nsum\n</think>\n\nFour<|im_end|>\n"]
    assert parts(second) == ["<think>\nagain\n</think>\n\nSix<|im_end|>\n"]
    assert "sum" not in second.text


def test_generation_blocks_are_found_whatever_the_text_holds():
    [passage] = TEMPLATES["generation"].passages(conversation("\ue000a\ue001", "\ue000\ue000b\ue001"))
    assert parts(passage) == ["\ue000\ue000b\ue001<|im_end|>"]


@pytest.mark.parametrize("case", RENDERED["errors"], ids=lambda case: case["messages"][-1]["role"])
def test_a_template_that_raises_is_named_with_file_and_line_of_the_row(case):
    given = text.conversation_of({"messages": [*case["messages"], YES]}, "chat.jsonl, line 3")
    with pytest.raises(ValueError, match=r"^chat\.jsonl, line 3: the chat template .*inst\.jinja raises ") as caught:
        TEMPLATES["inst"].passages(given)
    assert case["message"] in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content + 1 }}", "raises TypeError: can only concatenate str"),
        ("{{ messages[7].content }}", "raises UndefinedError: list object has no element 7"),
        ("{{ ''.__class__.__mro__ }}", "raises SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "raises SecurityError: access to attribute 'append' of"),
        ("{{ range(10000000) | list }}", "raises OverflowError: Range too big"),
        ("{{ messages | length }}", r"expected the text up to messages\[1\] to begin with that of the messages before"),
        ("{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x | length }}", "generation blocks whose text"),
    ],
)
def test_what_a_template_can_not_do_is_an_error_of_the_row(source, message):
    with pytest.raises(ValueError, match=f"chat.jsonl, line 3: chat template.*{message}"):
        text.ChatTemplate(source).passages(conversation("a", "b"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_leaves_out_replies_of_the_prompt(name):
    chat = conversation("2 + 2?", "Four", "3 + 3?", "Six", "4 + 4?", "Eight")
    replies = [part for passage in TEMPLATES[name].passages(chat) for part in parts(passage)]
    assert len(replies) == 3
    for length, kept in ((1, 3), (3, 2), (5, 1)):
        passages = TEMPLATES[name].passages(chat._replace(prompt_length=length))
        assert [part for passage in passages for part in parts(passage)] == replies[-kept:]
    with pytest.raises(ValueError, match="line 3: messages of the completion: expected one of the role 'assistant'"):
        TEMPLATES[name].passages(conversation("a", "b", "c")._replace(prompt_length=2))


def test_a_conversation_without_a_reply_is_refused():
    with pytest.raises(ValueError, match=r"line 3: messages: expected one of the role 'assistant', got only"):
        TEMPLATES["chatml"].passages(conversation("a"))


def test_malformed_and_missing_templates_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chat template: no file .*none\.jinja"):
        text.load_chat_template(TOKENIZER, tmp_path / "none.jinja")
    (tmp_path / "a.jinja").write_text("\n{% for message in messages %}")
    with pytest.raises(ValueError, match=r"a\.jinja, line 2: Unexpected end of template"):
        text.load_chat_template(TOKENIZER, tmp_path / "a.jinja")
    (tmp_path / "b.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b\.jinja: expected a Jinja template in UTF-8"):
        text.load_chat_template(TOKENIZER, tmp_path / "b.jinja")


def test_a_tokenizer_reads_the_chat_template_of_its_folder(tmp_path):
    assert TOKENIZER.chat_template is None
    assert text.load_chat_template(TOKENIZER) is None
    (tmp_path / "tokenizer.json").write_text((GOLDEN / "tokenizer.json").read_text())

    def rendered(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
        return text.load_chat_template(text.load_tokenizer(tmp_path)).render([USER])

    named = [{"name": name, "template": f"{name}{{{{ eos_token }}}}{{{{ bos_token }}}}"} for name in ("rag", "default")]
    assert rendered(chat_template="one") == "one"
    assert rendered(chat_template=named) == "default</s>"
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: expected a template, got int"):
        rendered(chat_template=3)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered(chat_template="one") == "file"


def test_end_tokens_are_what_a_template_puts_after_a_reply():
    ends = {name: [TOKENIZER.encode(token) for token in tokens] for name, tokens in ENDS.items()}
    assert {name: [[t] for t in template.end_tokens(TOKENIZER)] for name, template in TEMPLATES.items()} == ends
    for source in ("{{ messages[1].content }}", "{{ messages[1].content }} bye", "{{ raise_exception('no') }}"):
        assert text.ChatTemplate(source).end_tokens(TOKENIZER) == ()


ENDS = {
    "chatml": ["<|im_end|>"],
    "inst": ["</s>"],
    "headers": ["<|eot|>"],
    "generation": ["<|im_end|>"],
    "reasoning": ["<|im_end|>"],
}


def test_packed_conversations_have_segments_and_the_loss_of_their_replies():
    chats = [conversation("Hi", "Hello there."), conversation("Thanks", "Still there.", "again", "Hello")]
    passages = [passage for chat in chats for passage in TEMPLATES["chatml"].passages(chat)]
    rows = text.pack_rows(passages, TOKENIZER, 160)
    assert rows["inputs"].shape == (1, 160)
    for number, passage in enumerate(passages, start=1):
        own = rows["segment_ids"][0] == number
        tokens = TOKENIZER.encode(passage.text)
        assert rows["inputs"][0][own].tolist() == tokens[:-1]
        assert rows["positions"][0][own].tolist() == list(range(len(tokens) - 1))
        learnt = rows["labels"][0][own & (rows["weights"][0] > 0)].tolist()
        assert learnt == [token for part in parts(passage) for token in TOKENIZER.encode(part)]
    assert not rows["weights"][0][rows["segment_ids"][0] == 0].any()


def test_bytes_of_a_reply_are_in_the_loss():
    tokenizer = text.ByteTokenizer()
    [passage] = text.load_chat_template(tokenizer, GOLDEN / "chatml.jinja").passages(conversation("é", "東京"))
    tokens, in_loss = text.encode(passage, tokenizer)
    assert bytes(tokens.tolist()).decode() == passage.text
    assert bytes(tokens[in_loss].tolist()).decode() == "東京<|im_end|>\n"
