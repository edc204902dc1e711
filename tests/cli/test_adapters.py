"""The commands for adapters of language models, on a model of two layers."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, interop, nn, optim, train
from subspace_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("standard_promotion")
MODEL = nn.CausalLMConfig.gpt2(259, 16, 2, 2, max_length=32, bos_token=256, eos_tokens=(257,), pad_token=258)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, standard_promotion):
    """A model, two texts, and a config."""
    folder = tmp_path_factory.mktemp("adapters")
    interop.save_causal_lm(folder / "model", MODEL, nn.init_params(jax.random.key(0), MODEL))
    for name in ("train", "eval"):
        (folder / f"{name}.txt").write_text("\n\n".join(f"{i} and {i} is {2 * i}." for i in range(60)))
    (folder / "config.py").write_text(
        "from subspace_jax.language import finetune\n"
        "def get_config():\n"
        "    config = finetune.default_config()\n"
        f"    config.data.source = {str(folder / 'train.txt')!r}\n"
        f"    config.data.evaluation = {str(folder / 'eval.txt')!r}\n"
        "    config.data.length, config.data.batch_size, config.data.eval_batch_size = 32, 8, 8\n"
        "    config.train.steps, config.train.checkpoint_every, config.train.log_every = 4, 2, 4\n"
        "    config.train.eval_every, config.optim.warmup_steps = 4, 1\n"
        "    return config\n"
    )
    return folder


def finetune(folder, workdir, *settings):
    arguments = ["--config", str(folder / "config.py"), "--model", str(folder / "model"), "--workdir", str(workdir)]
    return main(["finetune", "--quiet", *arguments, *(f"--config.{setting}" for setting in settings)])


DORA = ("adapter.method=dora", "adapter.rank=2", "optim.learning_rate=0.02")


@pytest.fixture(scope="module")
def tuned(folder):
    """A run with DoRA, without the picture, which takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "plot_curves", lambda *arguments: None)
        assert finetune(folder, folder / "dora", *DORA) == 0
    return folder / "dora"


def perplexity(capsys, *arguments):
    assert main(["perplexity", *map(str, arguments), "--length", "32"]) == 0
    return float(capsys.readouterr().out.split()[1])


def test_finetune_gives_only_adapters_to_the_optimizer_and_the_checkpoints(tuned, folder):
    restored = train.restore(tuned)
    state, optim_fields = restored.state, restored.run.config.optim
    weights = interop.load_causal_lm(folder / "model")[1]
    chex.assert_trees_all_equal(state.variables["base"], weights)
    trained = optax.tree.size(state.params)
    assert trained < 0.5 * nn.count_params(MODEL)
    # Both moments of Adam, and counters.
    assert 2 * trained <= optax.tree.size(state.opt_state) <= 2 * trained + 8
    there = {path.name for path in (tuned / "checkpoints" / "4" / "state").iterdir()}
    tree = json.loads((tuned / "checkpoints" / "4" / "state" / "_METADATA").read_text())["tree_metadata"]
    assert there
    assert not [name for name in tree if "base" in name]
    assert (optim_fields.schedule, optim_fields.learning_rate) == ("linear", 0.02)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_sharded_finetune_is_evaluated_on_one_device(folder, tmp_path, capsys):
    assert finetune(folder, tmp_path / "run", *DORA, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2") == 0
    state = train.restore(tmp_path / "run").state
    assert not state.variables["base"]["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    capsys.readouterr()
    mesh = [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")]
    assert main(["eval", "--workdir", str(tmp_path / "run"), *mesh]) == 0
    printed = capsys.readouterr().out
    # Printed with four decimals; sums in another order.
    assert float(printed.split("loss ")[1].split(";")[0]) == pytest.approx(rows[-1]["loss"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_finetune_that_was_stopped_ends_with_the_same_bits(folder, tmp_path):
    settings = (*DORA, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    assert finetune(folder, tmp_path / "run", *settings) == 0
    uninterrupted = train.restore(tmp_path / "run").state
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert finetune(folder, tmp_path / "run", *settings) == 0
    resumed = train.restore(tmp_path / "run").state
    chex.assert_trees_all_equal((uninterrupted.params, uninterrupted.opt_state), (resumed.params, resumed.opt_state))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4


def test_merge_and_export_write_what_perplexity_measures_with_the_adapter(tuned, folder, capsys):
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"]
    assert (config["r"], config["lora_alpha"]) == (2, 4.0)
    assert config["base_model_name_or_path"] == str(folder / "model")
    data = ("--data", folder / "eval.txt")
    before = perplexity(capsys, "--model", folder / "model", *data)
    adapted = perplexity(capsys, "--model", folder / "model", "--adapter", tuned / "adapter", *data)
    assert adapted < before

    arguments = ["--model", str(folder / "model"), "--adapter", str(tuned / "adapter"), "--out", str(folder / "merged")]
    assert main(["merge", *arguments]) == 0
    assert main(["export", "--workdir", str(tuned), "--merged", "--out", str(folder / "exported")]) == 0
    assert main(["export", "--workdir", str(tuned), "--out", str(folder / "peft")]) == 0
    capsys.readouterr()
    for merged in ("merged", "exported"):
        # Printed with three decimals.
        assert perplexity(capsys, "--model", folder / merged, *data) == pytest.approx(adapted, abs=2e-3)
    name = "adapter_model.safetensors"
    assert (folder / "peft" / name).read_bytes() == (tuned / "adapter" / name).read_bytes()
    assert main(["merge", *arguments]) == 2
    assert "exists" in capsys.readouterr().err
    prompt = ["--prompt", "3 and", "--max-new-tokens", "3"]
    assert main(["generate", "--model", str(folder / "model"), "--adapter", str(tuned / "adapter"), *prompt]) == 0
    assert capsys.readouterr().out.startswith("3 and")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "learning_rate"),
    [
        (("adapter.method=effort", "adapter.modules_to_save=norm/scale"), 2e-4),
        (("adapter.method=svfit", "adapter.target_modules=attn/qkv,mlp/up=3"), 2e-3),
        (("adapter.method=lora", "adapter.init=pissa", "adapter.rank=2"), 2e-4),
    ],
)
def test_finetune_of_methods_that_factor_a_weight_resumes_from_their_factors(
    folder, tmp_path, capsys, settings, learning_rate
):
    assert finetune(folder, tmp_path / "run", *settings) == 0
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    restored = train.restore(tmp_path / "run")
    uninterrupted = restored.state
    assert restored.run.config.optim.learning_rate == learning_rate
    exported = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert finetune(folder, tmp_path / "run", *settings) == 0
    again = train.restore(tmp_path / "run").state
    chex.assert_trees_all_equal((uninterrupted.params, uninterrupted.variables), (again.params, again.variables))
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == exported
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "peft")]) == 2
    assert "settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.eight_devices
def test_finetune_adapts_a_tied_embedding_table_by_its_rule_and_writes_merged_weights(folder, tmp_path, capsys):
    settings = [
        "adapter.method=lora",
        "adapter.target_modules=embed/embedding=2,attn/qkv=2",
        "optim.learning_rate=0.02",
    ]
    assert finetune(folder, tmp_path / "run", *settings, "mesh.fsdp=4", "mesh.tensor=2") == 0
    # PEFT would give the head of a tied model none of the update.
    assert not (tmp_path / "run" / "adapter").exists()
    capsys.readouterr()
    table = interop.load_causal_lm(folder / "model")[1]["embed"]["embedding"]
    merged = interop.load_causal_lm(tmp_path / "run" / "model")[1]["embed"]["embedding"]
    assert np.linalg.matrix_rank(np.asarray(merged - table), tol=1e-5) == 2
    data = ("--data", folder / "eval.txt")
    before, after = (perplexity(capsys, "--model", path, *data) for path in (folder / "model", tmp_path / "run/model"))
    assert after < before


@pytest.mark.slow
def test_commands_untie_a_model_whose_adapter_has_the_head_alone(folder, tmp_path, capsys):
    untied, params = nn.untie_causal_lm(MODEL, interop.load_causal_lm(folder / "model")[1])
    settings = {"attn/qkv": adapters.LoRA(2, 4.0), "head/kernel": adapters.Full()}
    trainable = adapters.init(jax.random.key(1), params, settings)
    trainable["head"]["kernel"]["full"] *= 0.5
    adapter = tmp_path / "run" / "adapter"
    interop.save_peft_adapter(adapter, untied, trainable, settings)
    arguments = ["--model", str(folder / "model"), "--adapter", str(adapter)]
    assert main(["merge", *arguments, "--out", str(tmp_path / "merged")]) == 0
    config, merged = interop.load_causal_lm(tmp_path / "merged")
    assert not config.tied
    chex.assert_trees_all_equal(merged, {**params, "head": {"kernel": trainable["head"]["kernel"]["full"]}})
    capsys.readouterr()
    data = ("--data", folder / "eval.txt")
    plain, adapted = (perplexity(capsys, "--model", folder / "model", *more, *data) for more in ((), arguments[2:]))
    assert plain != adapted
    # Printed with three decimals.
    assert perplexity(capsys, "--model", tmp_path / "merged", *data) == pytest.approx(adapted, abs=2e-3)
    prompt = ["--prompt", "3 and", "--max-new-tokens", "3"]
    assert main(["generate", *arguments, *prompt]) == 0
    (tmp_path / "run" / "checkpoints").mkdir()
    assert main(["generate", "--model", str(folder / "model"), "--adapter", str(adapter.parent), *prompt]) == 2
    assert f"this is a run; its adapter is {adapter}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tied_embedding_table_that_trains_is_exported_as_both_modules(folder, tmp_path):
    settings = ["adapter.method=lora", "adapter.target_modules=attn/qkv=2", "adapter.modules_to_save=embed/embedding"]
    assert finetune(folder, tmp_path / "run", *settings) == 0
    fields = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["transformer.wte", "lm_head"]
    arguments = ["--model", str(folder / "model"), "--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["merge", *arguments, "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", "--workdir", str(tmp_path / "run"), "--merged", "--out", str(tmp_path / "exported")]) == 0
    (config, merged), (again, exported) = (interop.load_causal_lm(tmp_path / name) for name in ("merged", "exported"))
    assert config == again == MODEL
    chex.assert_trees_all_equal(merged, exported)


@pytest.mark.slow
def test_finetune_by_adaprelora_takes_energies_of_whole_weights_and_exports_factors_alone(folder, tmp_path):
    settings = ["adapter.method=lora", "adapter.rank=2", "optim.clip_norm=1.0"]
    settings += ["optim.name=adaprelora", "optim.kwargs.stats=full", "optim.learning_rate=1e-2"]
    assert finetune(folder, tmp_path / "run", *settings) == 0
    state = train.restore(tmp_path / "run").state
    energies = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, optim.AdaPreLoRAState))[0].energy
    # The state has a zero for each probe, too.
    assert all(float(jnp.max(x)) > 0 for x in jax.tree.leaves(adapters.drop_gradient_probes(energies)))
    read = interop.load_peft_adapter(tmp_path / "run" / "adapter", interop.read_config(folder / "model"))
    wanted = adapters.drop_gradient_probes(state.params)
    chex.assert_trees_all_equal(read.trainable, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter.method=lorra"], "adapter.method: expected one of"),
        (["adapter.method=lora", "adapter.target_modules=attn/qkw"], "adapter.target_modules: 'attn/qkw' matches none"),
        (["adapter.method=lora", "adapter.rank=-1"], "adapter.rank, adapter.alpha: expected at least 0"),
        (["adapter.method=lora", "adapter.init=zeros"], "adapter.init: expected one of"),
        (["adapter.method=svfit", "adapter.param=exp"], "adapter.param: expected one of"),
        (["adapter.method=effort", "adapter.rank=99"], "residual: 99 triplets"),
        (["adapter.method=dora", "adapter.target_modules=mlp/up,mlp/up=4"], "'mlp/up' is named twice"),
        (["adapter.method=dora", "adapter.base_dtype=int4"], "adapter.base_dtype: expected"),
        (["adapter.methods=dora"], "did you mean adapter.method"),
    ],
)
def test_finetune_refuses_bad_settings_before_work_starts(folder, tmp_path, capsys, settings, message):
    assert finetune(folder, tmp_path / "run", *settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_merge_and_generate_refuse_an_adapter_of_another_model(tuned, tmp_path, capsys):
    other = nn.CausalLMConfig.gpt2(259, 8, 1, 2, max_length=32)
    interop.save_causal_lm(tmp_path / "other", other, nn.init_params(jax.random.key(0), other))
    arguments = ["--model", str(tmp_path / "other"), "--adapter", str(tuned / "adapter")]
    assert main(["merge", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "expected" in capsys.readouterr().err
    assert main(["generate", *arguments[:3], str(tmp_path / "none"), "--prompt", "a", "--max-new-tokens", "2"]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [("lm/smollm2:lora", "no work/models/smollm2; `subspace-jax fetch smollm2` writes it"), ("lm/tiny", "names none")],
)
def test_finetune_names_the_command_that_writes_a_missing_model(config, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--config", config, "--workdir", "run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
