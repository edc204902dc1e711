"""The command on folders that PEFT wrote, and on runs."""

import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, language, nn, train
from subspace_jax.cli.main import main

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BASE, PEFT = GOLDEN / "interop" / "llama", GOLDEN / "peft" / "llama"
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def params():
    return interop.load_causal_lm(BASE, dtype=jnp.float32)


def update(folder):
    """What an adapter adds to each weight."""
    config, weights = params()
    own = interop.load_peft_adapter(folder, config)
    made = adapters.materialize(weights, own.trainable, own.settings)
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), made, weights)


def command(out, *names, **options):
    given = [text for name, value in options.items() for text in (f"--{name}", *map(str, np.atleast_1d(value)))]
    folders = [str(PEFT / name) for name in names]
    return main(["merge-adapters", "--quiet", "--adapters", *folders, "--base", str(BASE), "--out", str(out), *given])


def assert_sum(out, names, weights):
    updates = [update(PEFT / name) for name in names]
    wanted = jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *updates)
    for got, expected in zip(jax.tree.leaves(update(out)), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


def test_merge_adapters_of_lora_rslora_and_patterns_writes_a_folder_that_adds_their_weighted_updates(tmp_path, capsys):
    names, weights = ("lora_patterns", "rslora", "lora_layers"), (0.5, -0.25, 1.0)
    assert command(tmp_path / "out", *names, weights=weights) == 0
    assert_sum(tmp_path / "out", names, weights)
    assert "Relative error of the update of all weights" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["kind"] == "LoRA"
    assert report["error"] < 1e-6
    ranks = {(own["weight"], own["layer"]): own["rank"] for own in report["matrices"]}
    assert ranks[("layers/attn/q/kernel", 1)] == 2 + 4
    assert ranks[("layers/attn/v/kernel", 0)] == 0
    assert (tmp_path / "out" / "merge_report.png").stat().st_size > 1000


@pytest.mark.slow
def test_merge_adapters_of_dora_reads_the_weights_and_writes_dora(tmp_path):
    names = ("lora_layers", "dora")
    assert command(tmp_path / "out", *names) == 0
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["use_dora"]
    assert_sum(tmp_path / "out", names, (0.5, 0.5))


def refused(out, capsys, match, *names, **options):
    assert command(out, *names, **options) == 2
    assert re.search(match, capsys.readouterr().err)
    assert not out.exists()


def test_merge_adapters_refuses_what_it_cannot_merge_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    refused(out, capsys, "lora_head: head/kernel: Full.* train whole parameters", "lora", "lora_head")
    refused(out, capsys, "weights: expected 2", "lora", "rslora", weights=(1.0,))
    refused(out, capsys, "rank: expected an integer of at least 1, got 0", "lora", rank=0)
    refused(out, capsys, "keep: expected a share", "lora", method="ties", keep=1.5)
    refused(out, capsys, "nothing: expected the folder of a PEFT adapter or of a run", "nothing")
    out.mkdir()
    (out / "file").write_text("")
    assert command(out, "lora") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["file"]


def copied(folder, name, base):
    """An adapter that names another model."""
    shutil.copytree(PEFT / name, folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": base}))
    return str(folder)


def test_merge_adapters_refuses_adapters_that_name_different_models_unless_told_the_base(tmp_path, capsys):
    one, two = (
        copied(tmp_path / "one", "lora_layers", str(BASE)),
        copied(tmp_path / "two", "lora_layers", "other/llama"),
    )
    arguments = ["merge-adapters", "--quiet", "--out", str(tmp_path / "out"), "--adapters"]
    assert main([*arguments, one, two]) == 2
    assert re.search(r"expected those of one model.*llama, \S+two: other/llama", capsys.readouterr().err)
    assert main([*arguments, two]) == 2
    assert re.search(r"--base: expected the folder of the model.*two: other/llama", capsys.readouterr().err)
    assert main([*arguments, two, "--base", str(GOLDEN / "interop" / "gpt2")]) == 2
    assert not (tmp_path / "out").exists()
    # The folder that all name is found.
    assert main([*arguments, one]) == 0
    assert_sum(tmp_path / "out", ["lora_layers"], [1.0])


CONFIG = """
from subspace_jax.language import finetune
def get_config():
    config = finetune.default_config()
    config.data.source, config.data.evaluation = {text!r}, {text!r}
    config.data.length, config.data.batch_size, config.data.eval_batch_size = 16, 2, 2
    config.train.steps = config.train.checkpoint_every = config.train.eval_every = config.train.log_every = 2
    config.optim.warmup_steps = 1
    return config
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svfit", "flora"])
def test_merge_adapters_reads_runs_of_methods_that_peft_lacks(method, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} and {i} is {2 * i}." for i in range(60)))
    (tmp_path / "config.py").write_text(CONFIG.format(text=str(text)))
    model = nn.CausalLMConfig.gpt2(259, 16, 2, 2, max_length=32, bos_token=256, eos_tokens=(257,), pad_token=258)
    interop.save_causal_lm(tmp_path / "model", model, nn.init_params(jax.random.key(0), model))
    run = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "config.py"), "--model", str(tmp_path / "model"), "--workdir", str(run)]
    settings = (f"--config.adapter.method={method}", "--config.adapter.rank=3", "--config.optim.learning_rate=0.02")
    assert main(["finetune", "--quiet", *arguments, *settings]) == 0
    assert main(["merge-adapters", "--quiet", "--adapters", str(run), "--out", str(tmp_path / "out")]) == 0
    restored = train.restore(run)
    trained = restored.phase.task.merged(restored.state.params, restored.state.variables)
    _, merged = language.load_adapted(tmp_path / "model", tmp_path / "out")
    base = interop.load_causal_lm(tmp_path / "model")[1]
    moved = 0.0
    for got, wanted, before in zip(*map(jax.tree.leaves, (merged, trained, base)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
        moved = max(moved, np.abs(np.asarray(wanted) - np.asarray(before)).max())
    assert moved > 1e-3


@pytest.mark.slow
def test_merge_adapters_of_two_adapters_of_smollm2_equals_the_dense_merge(tmp_path, record_property):
    folder = pathlib.Path("work/models/smollm2")
    if not (folder / "config.json").exists():
        pytest.skip("subspace-jax fetch smollm2 writes the model")
    config = interop.read_config(folder)
    settings = {"layers/attn/*": adapters.LoRA(16, 16.0), "layers/mlp/*": adapters.LoRA(16, 32.0)}
    sources = []
    for seed in (0, 1):
        own = adapters.init(jax.random.key(seed), nn.init_params(jax.random.key(2), config), settings)
        leaves, structure = jax.tree.flatten(own)
        rng = np.random.default_rng(seed)
        own = jax.tree.unflatten(structure, [x + 0.02 * rng.standard_normal(x.shape, np.float32) for x in leaves])
        interop.save_peft_adapter(tmp_path / str(seed), config, own, settings, base_model=str(folder))
        sources.append(own)
    given = ["--adapters", str(tmp_path / "0"), str(tmp_path / "1"), "--weights", "0.8", "-0.4"]
    assert main(["merge-adapters", *given, "--out", str(tmp_path / "out")]) == 0
    merged = interop.load_peft_adapter(tmp_path / "out", config)
    worst = 0.0
    scales = {"attn": 1.0, "mlp": 2.0}
    for part, modules in merged.trainable["layers"].items():
        for name, module in modules.items():
            factors = [own["layers"][part][name]["kernel"] for own in sources]
            for i in range(module["kernel"]["a"].shape[0]):
                a, b = (np.asarray(module["kernel"][x][i], np.float64) for x in "ab")
                parts = [np.asarray(own["a"][i], np.float64) @ np.asarray(own["b"][i]) for own in factors]
                exact = scales[part] * (0.8 * parts[0] - 0.4 * parts[1])
                worst = max(worst, np.linalg.norm(a @ b - exact) / np.linalg.norm(exact))
    record_property("relative_error", worst)
    assert worst < 1e-5
