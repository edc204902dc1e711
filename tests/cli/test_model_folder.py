"""A ``--model`` that is not there, or no model: the message names the nearest one, or the command that writes it."""

import pytest

from subspace_jax.cli.main import main


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Folders and files with the names of models, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "work/models/llama",
        "work/models/hub/snapshots/1f",
        "work/models/minilm",
        "runs/empty",
        "runs/texts",
        "runs/my-minilm-2",
    ):
        (tmp_path / name).mkdir(parents=True)
    for name in ("work/models/llama/config.json", "work/models/hub/snapshots/1f/config.json", "some.gguf"):
        (tmp_path / name).touch()
    for i in range(5):
        (tmp_path / "runs" / "texts" / f"{i}.txt").touch()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("work/models/lama", "--model: there is no work/models/lama; did you mean work/models/llama?"),
        ("wrok/model/LLaMA", "there is no wrok/model/LLaMA; did you mean work/models/llama?"),
        ("smoe.gguf", "there is no smoe.gguf; did you mean some.gguf?"),
        ("work/models/smollm2/", "there is no work/models/smollm2/; `subspace-jax fetch smollm2` writes it"),
        ("HuggingFaceTB/SmolLM2-135M", "; `subspace-jax fetch smollm2` writes work/models/smollm2"),
        ("runs/my-minilm", "there is no runs/my-minilm; did you mean runs/my-minilm-2?"),
        ("minillm", "there is no minillm; `subspace-jax fetch minilm` writes work/models/minilm"),
        ("qwen", "there is no qwen\n"),
        ("work/models/hub", "no such file; expected the folder of a Hugging Face or timm checkpoint; did you mean wo"),
        ("work/models/hub", "did you mean work/models/hub/snapshots/1f?"),
        ("work/models", "work/models/config.json: no such file"),
        ("work/models", "; did you mean work/models/llama?"),
        (".", "; did you mean some.gguf?"),
        ("runs/empty", "--model: there is nothing in runs/empty\n"),
        ("work/models/minilm", "there is nothing in work/models/minilm; `subspace-jax fetch minilm` writes it"),
        ("runs/texts", "; it holds 0.txt, 1.txt, 2.txt and 2 more"),
    ],
)
def test_commands_name_the_model_that_a_wrong_folder_may_mean(files, model, message, capsys):
    assert main(["generate", "--model", model, "--prompt", "a"]) == 2
    assert message in capsys.readouterr().err


def test_commands_name_a_fetched_model_by_its_folder(files, tmp_path, capsys):
    (tmp_path / "work" / "models" / "smollm2").mkdir()
    (tmp_path / "work" / "models" / "smollm2" / "config.json").touch()
    assert main(["perplexity", "--model", "smollm2", "--data", "docstrings"]) == 2
    assert "there is no smollm2; did you mean work/models/smollm2?" in capsys.readouterr().err
