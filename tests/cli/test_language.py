import jax
import pytest

from subspace_jax.cli.main import main
from subspace_jax.data import text

SHORT = ["--quiet", "--config.train.steps=4", "--config.optim.warmup_steps=1", "--config.data.batch_size=8"]


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    (folder / "some.txt").write_text("\n\n".join(f"the sum of {i} and {i} is {2 * i}." for i in range(200)))
    return folder


@pytest.fixture(scope="module")
def pretrained(folder, standard_promotion):
    from tests.docs.pages import REPOSITORY

    files = [f"--config.data.{name}={folder / 'some.txt'}" for name in ("source", "evaluation")]
    config = str(REPOSITORY / "configs" / "lm" / "tiny.py")
    arguments = ["--config", config, "--workdir", str(folder / "run"), *SHORT, *files]
    assert main(["pretrain", *arguments]) == 0
    return folder / "run" / "model", arguments, files


def test_a_pretrained_model_is_tuned_measured_and_continues_a_prompt(pretrained, folder, capsys):
    model, arguments, files = pretrained
    arguments = [*arguments[:3], str(folder / "tuned"), *SHORT, *files, "--config.optim.learning_rate=3e-4"]
    assert main(["finetune", "--model", str(model), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert str(folder / "tuned" / "model") in printed

    found = []
    for which in (model, folder / "tuned" / "model"):
        assert main(["perplexity", "--model", str(which), "--data", str(folder / "some.txt")]) == 0
        found.append(float(capsys.readouterr().out.split()[1]))
    assert found[1] < found[0] < 300

    for extra in ([], ["--temperature", "0.9", "--top-p", "0.9", "--seed", "3"]):
        assert main(["generate", "--model", str(model), "--prompt", "the sum", "--max-new-tokens", "5", *extra]) == 0
        assert capsys.readouterr().out.startswith("the sum")


def test_questions_are_answered_by_the_likeliest_option(pretrained, capsys, monkeypatch):
    # No set can be prepared without network; how records become questions has its own tests.
    questions = [text.Choice("the sum of 3 and 3 is", ["6.", "\x00\x01\x02"], 0)] * 3
    monkeypatch.setattr(text, "tfds_texts", lambda name, split, folder: questions)
    assert main(["accuracy", "--model", str(pretrained[0]), "--data", "ai2_arc", "--by-token"]) == 0
    assert capsys.readouterr().out == "accuracy 1.0000 over 3 questions\n"
    monkeypatch.setattr(text, "tfds_texts", lambda name, split, folder: [text.Completion("a", "b")])
    assert main(["accuracy", "--model", str(pretrained[0]), "--data", "gsm8k"]) == 2
    assert "--data: expected a set of questions with options" in capsys.readouterr().err


def test_bad_input_is_named(pretrained, folder, capsys):
    model, _, _ = pretrained
    for arguments, message in (
        (["generate", "--model", str(folder / "none"), "--prompt", "a"], "none"),
        (["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "1000"], "max_new_tokens"),
        (["perplexity", "--model", str(model), "--data", str(folder / "none.txt")], "no file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
