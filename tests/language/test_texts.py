"""The texts that a config names: files recognised by their fields, chat templates, shares held out."""

import json
import pathlib

import jax
import numpy as np
import pytest

from subspace_jax import language, nn, train
from subspace_jax.data import text

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chat"
TOKENIZER = text.load_tokenizer(GOLDEN)


def chats(count):
    return [
        {"messages": [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}."}]}
        for i in range(count)
    ]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats(40))) + "\n")
    config = language.default_config().unlock()
    config.data.source, config.data.holdout = str(tmp_path / "chat.jsonl"), 0.2
    config.data.chat_template = str(GOLDEN / "chatml.jinja")
    config.model.tokenizer = str(GOLDEN)
    return config.lock()


def test_texts_of_a_file_of_conversations_are_rendered_and_a_share_is_held_out(config):
    parts = [language.texts_of(config, split, TOKENIZER) for split in ("train", "eval")]
    assert [len(part) for part in parts] == [32, 8]
    assert not set(parts[0]) & set(parts[1])
    rendered = {passage.text for part in parts for passage in part}
    template = text.load_chat_template(TOKENIZER, GOLDEN / "chatml.jinja")
    assert rendered == {template.render(row["messages"]) for row in chats(40)}
    other = train.override(config, ["data.holdout_seed=1"])
    assert set(language.texts_of(other, "eval", TOKENIZER)) != set(parts[1])
    again = train.override(config, ["seed=1"])
    assert language.texts_of(again, "eval", TOKENIZER) == parts[1]


def messages_of(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_repeated_rows_are_told_once_where_a_share_is_held_out(config, caplog):
    file = pathlib.Path(config.data.source)
    for split in ("train", "eval"):
        language.texts_of(config, split, TOKENIZER)
    assert messages_of(caplog) == []
    file.write_text("\n".join(map(json.dumps, [*chats(10), *chats(4) * 5])))
    parts = [language.texts_of(config, split, TOKENIZER) for split in ("train", "eval", "train")]
    held = len(parts[1])
    assert messages_of(caplog) == [
        f"data.holdout: 20 of the 30 examples of {file} repeat others; equal ones stay together, so that {held} "
        f"examples ({held / 0.3:.1f} %) are held out"
    ]


def test_empty_replies_and_completions_are_kept_and_told_once(config, caplog):
    file = pathlib.Path(config.data.source)
    rows = chats(10)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows[1]["messages"][1:1] = [call]
    for i in (3, 5):
        rows[i]["messages"][1]["content"] = " "
    file.write_text("\n".join(map(json.dumps, rows)))
    parts = [language.texts_of(config, split, TOKENIZER) for split in ("train", "eval")]
    assert sum(map(len, parts)) == 10
    learns = "from these the model learns to say nothing"
    assert messages_of(caplog) == [f"2 of 10 replies are empty, the first in {file}, line 4; {learns}"]
    caplog.clear()
    file.write_text('{"prompt": "", "completion": "a"}\n{"prompt": "a", "completion": ""}')
    assert len(language.texts_of(train.override(config, ["data.holdout=0"]), "train", TOKENIZER)) == 2
    assert messages_of(caplog) == [f"1 of 2 completions are empty, the first in {file}; {learns}"]


def test_a_run_trains_on_conversations_if_its_file_holds_them(config):
    assert language.trains_on_conversations(config)
    pathlib.Path(config.data.source).write_text('{"text": "a"}')
    assert not language.trains_on_conversations(config)
    for source in ("docstrings", "gsm8k"):
        assert not language.trains_on_conversations(train.override(config, [f"data.source={source}"]))


def test_a_template_gets_the_date_of_the_config(config):
    dated = train.override(config, [f"data.chat_template={GOLDEN / 'headers.jinja'}", "data.date=2024-07-26"])
    assert all("Today: 26 Jul 2024\n" in passage.text for passage in language.texts_of(dated, "eval", TOKENIZER))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.chat_template="], "data.chat_template: .*chat.jsonl holds conversations, and the tokenizer has no"),
        (["data.holdout=0"], "data.evaluation: expected a second file .*; data.holdout=0.05 holds out"),
        (["data.holdout=1.5"], "data.holdout: expected a share above 0 and below 1, got 1.5"),
        (["data.holdout=0.999"], "data.holdout: a share of 0.999 of 40 different examples leaves none"),
        (["data.evaluation=other.jsonl"], "data.holdout: a share of 0.2 .* beside no other set, got data.evaluation="),
        (["data.source=docstrings"], "data.holdout: a share of 0.2 .* got the split of 'docstrings'"),
        (["data.source=gsm8k"], "data.holdout: expected a file to hold out a share of, got the set 'gsm8k'"),
        (["data.date=yesterday"], "data.date: expected a date such as 2026-01-31, got 'yesterday'"),
        ([f"data.chat_template={GOLDEN / 'none.jinja'}"], "chat template: no file .*none.jinja"),
    ],
)
def test_texts_of_names_the_field_that_can_not_serve(config, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        language.texts_of(train.override(config, settings), "eval", TOKENIZER)


def test_build_packs_conversations_with_the_loss_of_their_replies(config):
    run = language.build(train.override(config, ["data.length=64", "data.batch_size=4"]))
    batch = next(run.phases[0].data.train(0))
    learnt = TOKENIZER.decode(batch["labels"][batch["weights"] > 0])
    assert len(learnt.splitlines()) >= 4
    assert all(line.endswith(".") and line[:-1].isdigit() for line in learnt.splitlines())
    assert np.all(np.max(batch["segment_ids"], axis=1) >= 1)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
def test_a_run_learns_replies_and_writes_the_chat_template_beside_the_weights(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    monkeypatch.setitem(language.finetune.SIZES, "tiny", small)
    settings = ["train.steps=12", "optim.learning_rate=1e-2", "data.length=64"]
    run = train.override(config, [*settings, "data.batch_size=4", "data.eval_batch_size=4"])
    assert train.run(run, tmp_path / "run", progress=False).metrics["loss"] < 0.8 * np.log(330)
    language.export(tmp_path / "run", tmp_path / "model")
    assert text.load_tokenizer(tmp_path / "model").chat_template == (GOLDEN / "chatml.jinja").read_text()


def small(**options):
    return nn.CausalLMConfig.tiny(hidden_size=16, mlp_size=32, num_kv_heads=2, num_layers=1, num_heads=2, **options)
