"""A Hugging Face folder with a tokenizer and all that may stand beside it: what commands obey of it, and carry over."""

import json
import re

import jax
import optax
import pytest
import tokenizers

from subspace_jax import adapters, interop, language, nn, train
from subspace_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("standard_promotion")

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
BESIDE = {
    "tokenizer_config.json": json.dumps(NAMES),
    "special_tokens_map.json": json.dumps(NAMES),
    "added_tokens.json": "{}",
    "tokenizer.model": "sentencepiece",
    "vocab.json": "{}",
    "merges.txt": "#version",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
}
OF_THE_MODEL = {
    "generation_config.json": json.dumps({"eos_token_id": [2]}),
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
}
NOT_CARRIED = {"README.md": "Another model's card.", "pytorch_model.bin": "weights", "trainer_state.json": "{}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 24}
    config = nn.CausalLMConfig.tiny(40, **sizes, max_length=32, bos_token=1, eos_tokens=(2,), pad_token=3)
    # Large weights, so that one word follows another instead of itself.
    params = jax.tree.map(lambda x: 8 * x, nn.init_params(jax.random.key(0), config))
    interop.save_causal_lm(folder, config, params)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, 40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {**BESIDE, **OF_THE_MODEL, **NOT_CARRIED}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder.parent / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i} w{i + 1}" * 3}) + "\n" for i in range(30))
    )
    return folder


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


WEIGHTS = {"config.json", "model.safetensors", "tokenizer.json"}


def generated(model, capsys, *arguments):
    assert main(["generate", "--model", str(model), "--prompt", "w5 w9", *arguments]) == 0
    return re.findall(r"w\d+|</s>", capsys.readouterr().out)[2:]


@pytest.fixture
def generation_config(model):
    file = model / "generation_config.json"
    before = file.read_text()
    yield lambda fields: file.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    file.write_text(before)


@pytest.mark.slow
def test_generate_ends_where_the_generation_config_says(model, capsys, generation_config):
    free = generated(model, capsys, "--max-new-tokens", "8")
    end = next(t for t in free[2:] if t not in free[:2])
    for ends in ([2, int(end[1:])], int(end[1:])):
        generation_config({"eos_token_id": ends})
        assert generated(model, capsys, "--max-new-tokens", "8") == free[: free.index(end) + 1]
        config, _ = interop.load_causal_lm(model)
        assert config.eos_tokens == tuple(ends if isinstance(ends, list) else [ends])
    # What it leaves open is as config.json has it.
    for fields in ({}, {"eos_token_id": None, "temperature": 0.6}):
        generation_config(fields)
        assert interop.read_config(model).eos_tokens == (2,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "generation_config.json: "),
        ([1], "generation_config.json: expected a JSON object, got list"),
        ({"eos_token_id": "</s>"}, "generation_config.json: eos_token_id: expected"),
        ({"eos_token_id": [2, 3.5]}, "generation_config.json: eos_token_id: expected"),
        ({"pad_token_id": True}, "generation_config.json: pad_token_id: expected"),
    ],
)
def test_generate_names_a_damaged_generation_config(model, capsys, generation_config, fields, message):
    generation_config(fields)
    assert main(["generate", "--model", str(model), "--prompt", "w5"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_merge_copies_tokenizer_and_generation_files(model, tmp_path, capsys):
    config, params = interop.load_causal_lm(model)
    settings = {"attn/q": adapters.LoRA(2, 4.0)}
    interop.save_peft_adapter(
        tmp_path / "adapter", config, adapters.init(jax.random.key(1), params, settings), settings
    )
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(model), "--adapter", str(tmp_path / "adapter"), "--out", str(merged)]) == 0
    assert names(merged) == WEIGHTS | {*BESIDE, *OF_THE_MODEL}
    for name, content in {**BESIDE, **OF_THE_MODEL}.items():
        assert (merged / name).read_text() == content


def test_merge_writes_the_chat_template_that_the_adapter_was_trained_by(model, tmp_path):
    config, params = interop.load_causal_lm(model)
    settings = {"attn/q": adapters.LoRA(2, 4.0)}
    trainable = adapters.init(jax.random.key(1), params, settings)
    interop.save_peft_adapter(tmp_path / "adapter", config, trainable, settings)
    (tmp_path / "adapter" / "chat_template.jinja").write_text("trained by")
    assert (
        main(
            [
                *("merge", "--model", str(model), "--adapter"),
                str(tmp_path / "adapter"),
                "--out",
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "trained by"


@pytest.fixture
def start(model, monkeypatch):
    """Makes a run's state as it is before the first step what a checkpoint of any workdir holds."""

    def start(*settings):
        source = [f"data.{name}={model.parent / 'texts.jsonl'}" for name in ("source", "evaluation")]
        sizes = ["data.length=8", "data.batch_size=8", "data.eval_batch_size=8"]
        run = train.build(train.override(language.default_config(), [*source, *sizes, *settings]))
        state = train.init_state(run.phases[0].task, optax.sgd(0.1), run.mesh)
        monkeypatch.setattr(train, "restore", lambda workdir, **_: train.Restored(run, run.phases[0], state, ()))

    return start


def test_export_copies_tokenizer_and_generation_files(model, start, tmp_path):
    start(f"model.folder={model}", "adapter.method=lora", "adapter.rank=2")
    language.export(tmp_path / "lora", tmp_path / "merged", merged=True)
    assert names(tmp_path / "merged") == WEIGHTS | {*BESIDE, *OF_THE_MODEL}
    # Generation is a matter of the model: an adapter's folder has the tokenizer's files alone.
    language.export(tmp_path / "lora", tmp_path / "adapter")
    weights = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert weights | {*BESIDE} <= names(tmp_path / "adapter") <= weights | {*BESIDE, "README.md"}


@pytest.mark.slow
def test_export_of_a_model_from_scratch_copies_the_files_of_its_tokenizer(model, start, tmp_path):
    start(f"model.tokenizer={model}", "model.size=tiny")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text("an older one")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    language.export(tmp_path / "run", tmp_path / "model")
    assert names(tmp_path / "model") == WEIGHTS | {*BESIDE, *OF_THE_MODEL, "notes.txt"}
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == BESIDE["chat_template.jinja"]


def test_side_files_does_not_mix_two_tokenizers(model, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    found = interop.side_files(model, tmp_path / "other.json")
    assert found["tokenizer.json"] == tmp_path / "other.json"
    assert found.keys() == {"tokenizer.json", "tokenizer_config.json", *OF_THE_MODEL}
    assert interop.side_files(model, "bytes").keys() == OF_THE_MODEL.keys()
    assert interop.side_files("", "bytes") == interop.side_files() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature: expected 0, or a finite number of at least 1e-6, got -1.0"),
        (["--temperature", "nan"], "--temperature: expected"),
        (["--temperature", "inf"], "--temperature: expected"),
        (["--top-p", "0"], "--top-p: expected a number in (0, 1], got 0.0"),
        (["--top-p", "1.5"], "--top-p: expected"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--max-new-tokens", "30"], "--prompt and --max-new-tokens: 3 tokens and max_new_tokens = 30 exceed"),
        (["--seed", str(2**64)], "--seed: expected"),
        (["--seed", "-1"], "--seed: expected"),
        (["--prompt", "w5 " * 40], "exceed the model's 32 positions"),
        (["--prompt", "w5 \udce9"], "expected Unicode text"),
    ],
)
def test_generate_refuses_bad_options_before_weights_are_read(model, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(language, "load_adapted", None)
    assert main(["generate", "--model", str(model), "--prompt", "w5 w9", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_generate_warns_of_end_tokens_outside_the_vocabulary(model, capsys, caplog, generation_config):
    generation_config({"eos_token_id": [2, 50256]})
    assert len(generated(model, capsys, "--max-new-tokens", "2")) == 2
    assert "no text ends with the tokens [50256]" in caplog.text


def test_generate_warns_of_a_model_without_a_tokenizer(tmp_path, capsys, caplog):
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "mlp_size": 8}
    for end, warned in ((2, True), (258, False)):
        config = nn.CausalLMConfig.tiny(259, **sizes, max_length=32, eos_tokens=(end,))
        interop.save_causal_lm(tmp_path / str(end), config, nn.init_params(jax.random.key(0), config))
        caplog.clear()
        # Refused after the tokenizer is known, so that nothing is compiled.
        assert main(["generate", "--model", str(tmp_path / str(end)), "--prompt", "a" * 40]) == 2
        assert ("texts are read as bytes" in caplog.text) == warned


def test_generate_does_not_take_another_tokenizer_for_bytes(model, capsys):
    (model / "tokenizer.json").rename(model / "aside")
    try:
        assert main(["generate", "--model", str(model), "--prompt", "w5"]) == 2
        assert "expected a tokenizer.json beside tokenizer.model" in capsys.readouterr().err
    finally:
        (model / "aside").rename(model / "tokenizer.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("textz.jsonl", "no file textz.jsonl; did you mean texts.jsonl?"),
        ("texts.jsonx", "no file texts.jsonx; did you mean texts.jsonl?"),
        ("texts", "there is no file 'texts', and no set with that name"),
        ("./model", "got the folder"),
        ("model", "got the folder"),
        ("docstring", "did you mean docstrings?"),
        ("gsm8j", "did you mean gsm8k?"),
        ("gem/e2e_nlg", "the set 'gem/e2e_nlg' is not prepared under"),
        ("e2e_cleaned", "the set 'e2e_cleaned' is not prepared under"),
    ],
)
def test_perplexity_names_data_close_to_missing_data(model, capsys, monkeypatch, tmp_path, data, message):
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(language, "load_adapted", None)
    assert main(["perplexity", "--model", "model", "--data", data]) == 2
    assert message in capsys.readouterr().err
