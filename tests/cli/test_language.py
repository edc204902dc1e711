import json
from types import SimpleNamespace

import jax
import pytest

from subspace_jax import interop, language, nn, train
from subspace_jax.cli.main import main
from subspace_jax.data import text

SHORT = ["--quiet", "--config.train.steps=4", "--config.optim.warmup_steps=1", "--config.data.batch_size=8"]


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "some.txt").write_text("\n\n".join(f"the sum of {i} and {i} is {2 * i}." for i in range(200)))
    return folder


@pytest.fixture(scope="module")
def model(folder, standard_promotion):
    """A small model with random weights."""
    config = nn.CausalLMConfig.gpt2(259, 16, 2, 2, max_length=64, bos_token=256, eos_tokens=(257,), pad_token=258)
    interop.save_causal_lm(folder / "model", config, nn.init_params(jax.random.key(0), config))
    return folder / "model"


@pytest.fixture(scope="module")
def pretrained(folder, standard_promotion):
    files = [f"--config.data.{name}={folder / 'some.txt'}" for name in ("source", "evaluation")]
    arguments = ["--config", "lm/tiny", "--workdir", str(folder / "run"), *SHORT, *files]
    assert main(["pretrain", *arguments]) == 0
    return folder / "run" / "model", arguments, files


def measured(model, data, capsys):
    capsys.readouterr()
    assert main(["perplexity", "--model", str(model), "--data", str(data), "--length", "64"]) == 0
    return float(capsys.readouterr().out.split()[1])


@pytest.mark.slow
def test_pretrain_writes_a_model_that_perplexity_and_generate_read(pretrained, folder, capsys):
    model, _, _ = pretrained
    assert measured(model, folder / "some.txt", capsys) < 300
    assert main(["generate", "--model", str(model), "--prompt", "the sum", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the sum")


@pytest.mark.slow
def test_finetune_lowers_the_perplexity_of_a_pretrained_model(pretrained, folder, capsys):
    model, arguments, files = pretrained
    arguments = [*arguments[:3], str(folder / "tuned"), *SHORT, *files, "--config.optim.learning_rate=3e-4"]
    assert main(["finetune", "--model", str(model), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    tuned = folder / "tuned" / "model"
    assert str(tuned) in printed
    assert measured(tuned, folder / "some.txt", capsys) < measured(model, folder / "some.txt", capsys)
    sampling = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "3"]
    assert main(["generate", "--model", str(tuned), "--prompt", "the sum", "--max-new-tokens", "5", *sampling]) == 0
    assert capsys.readouterr().out.startswith("the sum")


def test_finetune_ends_with_a_chat_where_its_data_are_chats(model, folder, tmp_path, monkeypatch, capsys):
    metrics = {"loss": 1.0, "accuracy": 0.5}
    monkeypatch.setattr(train, "run", lambda *arguments, **options: SimpleNamespace(metrics=metrics))
    monkeypatch.setattr(language, "export", lambda *arguments, **options: None)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    (tmp_path / "run").mkdir()
    lora = ["--config.adapter.method=lora", "--config.adapter.rank=2", f"--config.model.folder={model}"]
    template = "--config.data.chat_template=a.jinja"
    adapted = f"{model} --adapter {tmp_path}/run/adapter"
    for data, settings, wanted in (
        (tmp_path / "chat.jsonl", [], f"{tmp_path}/run/model --chat"),
        (tmp_path / "chat.jsonl", [template], f"{tmp_path}/run/model --chat"),
        (tmp_path / "chat.jsonl", lora, f"{adapted} --chat"),
        (tmp_path / "chat.jsonl", [*lora, template], f"{adapted} --chat --chat-template a.jinja"),
        (folder / "some.txt", lora, f"{adapted} --prompt 'Once upon a time'"),
    ):
        arguments = ["--config", "lm/tiny", "--workdir", str(tmp_path / "run"), "--model", str(model), "--quiet"]
        assert main(["finetune", *arguments, f"--config.data.source={data}", *settings]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"Next: subspace-jax generate --model {wanted}"


def test_accuracy_answers_questions_by_the_likeliest_option(model, capsys, monkeypatch):
    # No set can be prepared without network; how records become questions has its own tests.
    found = []
    for answer in (0, 1):
        questions = [text.Choice("the sum of 3 and 3 is", ["6.", "\x00\x01\x02"], answer)] * 3
        monkeypatch.setattr(text, "tfds_texts", lambda name, split, folder, questions=questions: questions)
        assert main(["accuracy", "--model", str(model), "--data", "ai2_arc", "--by-token"]) == 0
        found.append(capsys.readouterr().out)
    assert sorted(found) == ["accuracy 0.0000 over 3 questions\n", "accuracy 1.0000 over 3 questions\n"]
    monkeypatch.setattr(text, "tfds_texts", lambda name, split, folder: [text.Completion("a", "b")])
    assert main(["accuracy", "--model", str(model), "--data", "gsm8k"]) == 2
    assert "--data: expected a set of questions with options" in capsys.readouterr().err


def test_commands_name_bad_input(model, folder, capsys):
    for arguments, message in (
        (["generate", "--model", str(folder / "none"), "--prompt", "a"], "none"),
        (["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "1000"], "max_new_tokens"),
        (["perplexity", "--model", str(model), "--data", str(folder / "none.txt")], "no file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
