import pytest

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
def pretrained(folder, standard_promotion):
    files = [f"--config.data.{name}={folder / 'some.txt'}" for name in ("source", "evaluation")]
    arguments = ["--config", "lm/tiny", "--workdir", str(folder / "run"), *SHORT, *files]
    assert main(["pretrain", *arguments]) == 0
    return folder / "run" / "model", arguments, files


def measured(model, data, capsys):
    capsys.readouterr()
    assert main(["perplexity", "--model", str(model), "--data", str(data), "--length", "64"]) == 0
    return float(capsys.readouterr().out.split()[1])


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


def test_accuracy_answers_questions_by_the_likeliest_option(pretrained, capsys, monkeypatch):
    # No set can be prepared without network; how records become questions has its own tests.
    questions = [text.Choice("the sum of 3 and 3 is", ["6.", "\x00\x01\x02"], 0)] * 3
    monkeypatch.setattr(text, "tfds_texts", lambda name, split, folder: questions)
    assert main(["accuracy", "--model", str(pretrained[0]), "--data", "ai2_arc", "--by-token"]) == 0
    assert capsys.readouterr().out == "accuracy 1.0000 over 3 questions\n"
    monkeypatch.setattr(text, "tfds_texts", lambda name, split, folder: [text.Completion("a", "b")])
    assert main(["accuracy", "--model", str(pretrained[0]), "--data", "gsm8k"]) == 2
    assert "--data: expected a set of questions with options" in capsys.readouterr().err


def test_commands_name_bad_input(pretrained, folder, capsys):
    model, _, _ = pretrained
    for arguments, message in (
        (["generate", "--model", str(folder / "none"), "--prompt", "a"], "none"),
        (["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "1000"], "max_new_tokens"),
        (["perplexity", "--model", str(model), "--data", str(folder / "none.txt")], "no file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
