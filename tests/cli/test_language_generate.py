import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, nn
from subspace_jax.cli.main import main
from subspace_jax.data import text

pytestmark = pytest.mark.usefixtures("standard_promotion")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chat"
TOKENIZER = text.load_tokenizer(GOLDEN)
TURN = TOKENIZER.encode("<|im_end|>")[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory, standard_promotion):
    """The folder of a small model with random weights, and its tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("lm") / "model"
    config = nn.CausalLMConfig.gpt2(330, 16, 1, 2, max_length=128, bos_token=0, eos_tokens=(1,), pad_token=2)
    params = jax.tree.map(lambda x: 20 * x, nn.init_params(jax.random.key(1), config))
    interop.save_causal_lm(folder, config, params)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / name, folder / name)
    shutil.copyfile(GOLDEN / "chatml.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """Greedy continuations by nn.generate, padded on the other side and to one length."""
    config, params = interop.load_causal_lm(model)

    def continued(prompt, ends=(1,)):
        tokens, mask = np.zeros((1, 122), np.int32), np.zeros((1, 122), bool)
        tokens[0, : len(prompt)], mask[0, : len(prompt)] = prompt, True
        options = {"max_new_tokens": 6, "eos_tokens": ends, "attention_mask": mask}
        new = nn.generate(config, params, jnp.asarray(tokens), **options)
        return text.decode_continuation(TOKENIZER, prompt, new.tokens[0, : int(new.lengths[0])])

    return continued


def rendered(*messages):
    template = text.load_chat_template(TOKENIZER, GOLDEN / "chatml.jinja")
    return TOKENIZER.encode(template.render(messages, add_generation_prompt=True))


def user(content):
    return {"role": "user", "content": content}


def generate(model, *arguments):
    return main(["generate", "--model", str(model), "--max-new-tokens", "6", *map(str, arguments)])


def given(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def test_generate_prints_a_prompt_and_its_continuation(model, expected, capsys):
    assert generate(model, "--prompt", "Hello") == 0
    assert capsys.readouterr().out == f"Hello{expected(TOKENIZER.encode('Hello'))}\n"


def test_generate_continues_the_prompts_of_a_file_in_batches(model, expected, tmp_path, capsys):
    rows = [{"id": i, "prompt": "Hello there. " * (i + 1)} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ("--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--batch-size", "2")
    assert generate(model, *arguments) == 0
    assert capsys.readouterr().out == f"Wrote 3 rows to {tmp_path / 'out.jsonl'}\n"
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("id", "prompt")} for row in found] == rows
    assert [row["generated"] for row in found] == [expected(TOKENIZER.encode(row["prompt"])) for row in rows]
    assert {row["finish_reason"] for row in found} <= {"length", "stop"}
    assert generate(model, *arguments) == 2
    assert "--out: " in capsys.readouterr().err


def test_generate_reads_prompts_from_the_standard_input(model, expected, monkeypatch, capsys):
    given(monkeypatch, "Hello\n\nStill there.\r\n")
    assert generate(model, "--prompts", "-", "--batch-size", "2") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == ["Hello", "Still there."]
    assert [row["generated"] for row in found] == [expected(TOKENIZER.encode(row["prompt"])) for row in found]


def test_generate_answers_messages_by_the_chat_template(model, expected, monkeypatch, capsys):
    reply = {"role": "assistant", "content": "Hello"}
    rows = [{"messages": [user("Hi"), reply]}, {"prompt": "Hi"}, {"messages": [user("a"), reply, user("b")]}]
    rows += [{"prompt": [user("Hi")], "completion": [reply]}]
    given(monkeypatch, "\n".join(map(json.dumps, rows)))
    assert generate(model, "--chat", "--prompts", "-", "--system", "Be brief", "--batch-size", "4") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    system, ends = {"role": "system", "content": "Be brief"}, (1, TURN)
    alone = expected(rendered(system, user("Hi")), ends)
    whole = expected(rendered(system, user("a"), reply, user("b")), ends)
    assert [row["generated"] for row in found] == [alone, alone, whole, alone]
    assert found[0]["messages"] == rows[0]["messages"]


@pytest.mark.slow
def test_generate_talks_with_the_conversation_so_far(model, expected, monkeypatch, capsys):
    given(monkeypatch, "Hi\n\nAnd?\n")
    assert generate(model, "--chat") == 0
    first = expected(rendered(user("Hi")), (1, TURN))
    second = expected(rendered(user("Hi"), {"role": "assistant", "content": first}, user("And?")), (1, TURN))
    assert capsys.readouterr().out == f"{first}\n{second}\n"


@pytest.mark.slow
def test_generate_leaves_out_the_oldest_turn_of_a_long_conversation(model, monkeypatch, capsys, caplog):
    given(monkeypatch, "\n".join([*["again " * 9] * 3, "again " * 99, "Hi"]))
    assert generate(model, "--chat") == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") >= 4
    assert "its oldest turn is left out" in caplog.text
    assert "exceed the model's 128 positions" in printed.err


@pytest.mark.slow
def test_generate_ends_where_the_template_ends_a_turn(model, tmp_path, monkeypatch, capsys):
    config, params = interop.load_causal_lm(model)
    table = params["embed"]["embedding"]
    silent = params | {"embed": params["embed"] | {"embedding": table.at[TURN].set(100 * jnp.max(jnp.abs(table)))}}
    silent["norm"] = {"scale": jnp.zeros_like(silent["norm"]["scale"]), "bias": jnp.ones_like(silent["norm"]["bias"])}
    shutil.copytree(model, tmp_path / "model")
    interop.save_causal_lm(tmp_path / "silent", config, silent, side_files=interop.side_files(tmp_path / "model"))
    given(monkeypatch, "Hi")
    assert generate(tmp_path / "silent", "--chat", "--prompts", "-", "--batch-size", "1") == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "Hi", "generated": "", "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: expected a text; or --prompts with a file, or --chat"),
        (["--prompt", "a", "--prompts", "-"], "--prompt, --prompts: expected one of them, got both"),
        (["--prompt", "a", "--system", "b"], "--system: is for --chat"),
        (["--prompt", "a", "--out", "b"], "--out: is for the rows of --prompts"),
        (["--prompts", "none.jsonl"], "--prompts: no file none.jsonl"),
        (["--prompts", "-", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--prompt", "a", "--chat", "--chat-template", "none.jinja"], "chat template: no file none.jinja"),
        (["--prompt", "a", "--chat", "--chat-template", GOLDEN / "raises.jinja"], "chat template: no file"),
    ],
)
def test_generate_names_arguments_that_can_not_serve(model, capsys, arguments, message):
    assert generate(model, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "chat", "message"),
    [
        ("\n", [], "--prompts: there is no prompt in standard input"),
        ('{"prompt": "a"}\n{"prompt": ', [], "standard input, line 2: expected a JSON object"),
        ('{"prompt": 3}', [], "standard input, line 1: expected 'prompt' with a text, got int"),
        ('{"text": "a"}', ["--chat"], "line 1: expected 'prompt' with a text, or messages, got the fields ['text']"),
        ('{"messages": []}', [], "line 1: 'messages' need --chat"),
        ('{"messages": [{"role": "user"}]}', ["--chat"], "line 1: messages[0]: no field 'content'"),
        ("again " * 150, [], "tokens and max_new_tokens = 6 exceed the model's 128 positions"),
        (
            '{"messages": [{"role": "robot", "content": "a"}]}',
            ["--chat", "--chat-template", GOLDEN / "inst.jinja"],
            "line 1: the chat template {GOLDEN}/inst.jinja raises Only user and assistant speak, got robot",
        ),
    ],
)
def test_generate_names_file_and_line_of_malformed_prompts(model, monkeypatch, capsys, content, chat, message):
    given(monkeypatch, content)
    assert generate(model, "--prompts", "-", *chat) == 2
    assert message.replace("{GOLDEN}", str(GOLDEN)) in capsys.readouterr().err


def test_generate_needs_a_chat_template_to_chat(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert generate(tmp_path / "model", "--chat") == 2
    assert "has no chat template; expected --chat-template FILE" in capsys.readouterr().err


def test_generate_chats_by_the_template_beside_an_adapter(model, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    config, params = interop.load_causal_lm(model)
    settings = {"mlp/up": adapters.LoRA(2, 4.0)}
    trainable = adapters.init(jax.random.key(1), params, settings)
    interop.save_peft_adapter(tmp_path / "adapter", config, trainable, settings)
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ raise_exception('the template of the adapter') }}")
    given(monkeypatch, json.dumps({"messages": [user("Hi")]}))
    assert generate(tmp_path / "model", "--prompts", "-", "--chat", "--adapter", str(tmp_path / "adapter")) == 2
    assert "the template of the adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_perplexity_measures_the_replies_of_conversations(model, tmp_path, capsys):
    rows = [{"messages": [user("Hi" * i), {"role": "assistant", "content": "Hello"}]} for i in range(1, 4)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["perplexity", "--model", str(model), "--data", str(tmp_path / "chat.jsonl")]) == 0
    replies = len(TOKENIZER.encode("Hello<|im_end|>\n")) * 3
    assert capsys.readouterr().out.endswith(f"over {replies} tokens\n")
