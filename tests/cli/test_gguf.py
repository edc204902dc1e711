"""A GGUF file where commands take the folder of a model."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, train
from subspace_jax.cli.main import main
from subspace_jax.language import finetune

pytestmark = pytest.mark.usefixtures("standard_promotion")
MODEL = pathlib.Path(__file__).parents[1] / "golden" / "gguf" / "tiny_qwen2.gguf"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "some.txt"
    file.write_text("\n\n".join(f"the sum of {i} and {i} is {2 * i}." for i in range(60)))
    return file


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_generate_reads_a_gguf_file(capsys):
    assert main(["generate", "--model", str(MODEL), "--prompt", "low-rank", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("low-rank")


def test_generate_reports_a_damaged_gguf_file(tmp_path, capsys):
    (tmp_path / "a.gguf").write_bytes(MODEL.read_bytes()[:20_000])
    assert main(["generate", "--model", str(tmp_path / "a.gguf"), "--prompt", "x"]) == 2
    assert f"{tmp_path / 'a.gguf'}: " in capsys.readouterr().err


def test_outline_reads_a_gguf_file():
    config = train.override(finetune.default_config(), [f"model.folder={MODEL}", "data.length=64"])
    (phase,) = finetune.outline(config).phases
    assert phase.task.config.vocab_size == 432


def test_side_files_of_a_gguf_file_are_those_of_its_tokenizer(tmp_path):
    assert interop.side_files(MODEL).keys() == TOKENIZER
    assert interop.side_files(MODEL, adapter=True).keys() == TOKENIZER
    assert interop.side_files(MODEL, "bytes") == {}
    interop.write_side_files(tmp_path, interop.side_files("", MODEL))
    assert names(tmp_path) == TOKENIZER


@pytest.mark.slow
def test_finetune_starts_from_a_gguf_file_and_merge_bakes_its_adapter(texts, tmp_path, capsys):
    common = ["--config", "lm/tiny", "--model", str(MODEL), "--quiet", "--config.train.steps=4"]
    common += ["--config.optim.warmup_steps=1", "--config.data.batch_size=4", "--config.data.length=64"]
    common += [f"--config.data.{name}={texts}" for name in ("source", "evaluation")]
    method = ["--config.adapter.method=lora", "--config.adapter.rank=2"]
    assert main(["finetune", *common, *method, "--workdir", str(tmp_path / "lora")]) == 0
    assert names(tmp_path / "lora" / "adapter") >= TOKENIZER
    merge = ["merge", "--model", str(MODEL), "--adapter", str(tmp_path / "lora" / "adapter")]
    assert main([*merge, "--out", str(tmp_path / "merged")]) == 0
    assert names(tmp_path / "merged") == {"config.json", "model.safetensors", *TOKENIZER}
    capsys.readouterr()
    for model in (MODEL, tmp_path / "merged"):
        assert main(["perplexity", "--model", str(model), "--data", str(texts), "--length", "64"]) == 0
    first, second = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert second < first


@pytest.mark.slow
def test_finetune_of_all_parameters_starts_from_a_gguf_file(texts, tmp_path):
    common = ["--config", "lm/tiny", "--model", str(MODEL), "--quiet", "--config.train.steps=1"]
    common += ["--config.optim.warmup_steps=0", "--config.data.batch_size=4", "--config.data.length=64"]
    common += [f"--config.data.{name}={texts}" for name in ("source", "evaluation")]
    assert main(["finetune", *common, "--config.optim.learning_rate=1e-12", "--workdir", str(tmp_path)]) == 0
    _, before = interop.load_causal_lm(MODEL, dtype=jnp.float32)
    _, after = interop.load_causal_lm(tmp_path / "model")
    np.testing.assert_allclose(after["embed"]["embedding"], before["embed"]["embedding"], atol=1e-6)
    assert names(tmp_path / "model") >= TOKENIZER
