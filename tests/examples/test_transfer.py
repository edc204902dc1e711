"""Adapters of small networks: a run of two phases, and the figures that the methods must reach."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from examples import fake_digits, rotated_digits, rotated_images, transfer
from subspace_jax import interop, train

SHORT = ["pretrain.epochs=1", "train.steps=4", "train.checkpoint_every=20", "train.eval_every=4"]

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:  # Optax raises to int32 powers
        patch.setattr(train.loop, "plot_curves", lambda *arguments: None)
        yield


def run(spec, workdir, *settings):
    return train.run(train.override(train.load_config(spec), settings), workdir, progress=False)


def build(spec, *settings):
    return train.build(train.override(train.load_config(spec), settings))


@pytest.mark.slow
def test_transfer_adapts_the_network_that_the_first_phase_trained_and_is_restored_with_its_singular_vectors(
    tmp_path, configs
):
    result = run(f"{configs}/adapters/rotated_digits.py:svfit_head", tmp_path, "seed=1", *SHORT)
    assert [row["phase"] for row in result.rows if row["split"] == "eval"][-2:] == ["pretrain", "adapt"]
    restored = train.restore(tmp_path)
    chex.assert_trees_all_equal(jax.device_get(restored.state.variables), jax.device_get(result.state.variables))
    shapes = jax.tree.map(jnp.shape, restored.state.params)
    assert shapes == {
        "layer1": {"kernel": {"delta": (64,)}},
        "layer2": {"kernel": {"delta": (128,)}},
        "head": {"kernel": {"full": (128, 10)}, "bias": {"full": (10,)}},
    }
    task = restored.phase.task
    assert isinstance(task, transfer.TransferTask)
    assert "SVFit" in task.table


def test_transfer_enters_with_the_numbers_of_the_pretrained_network(configs):
    made = build(f"{configs}/adapters/rotated_digits.py:lora")
    pretrained, adapted = made.phases
    params, _ = pretrained.task.init(jax.random.key(0))
    zero = jnp.zeros((), jnp.int32)
    state = train.TrainState(zero, zero, params, {}, (), jax.random.key_data(jax.random.key(0)), zero)
    trainable, variables, opt_state = adapted.enter(state, train.At((), jax.random.key(1), None, None))
    assert opt_state is None
    x = jnp.asarray(rotated_digits.digits(0)[0][:8].reshape(-1, 64))
    # A LoRA starts at zero.
    expected = rotated_digits.mlp(params, x)
    np.testing.assert_allclose(adapted.task.logits(trainable, variables, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"pretrain\.epochs: expected at least 1, got 0"):
        build(f"{configs}/adapters/rotated_digits.py:lora", "pretrain.epochs=0")


@pytest.mark.slow
def test_pretraining_reads_upright_digits_and_not_rotated_ones(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    made = build(f"{configs}/adapters/rotated_digits.py:lora", "pretrain.epochs=15")
    phase = made.phases[0]
    short = {"phases": (phase,), "best": "max:accuracy", "workdir": tmp_path, "progress": False}
    result = train.fit(dataclasses.replace(made, eval_every=0, checkpoint_every=0, **short))
    assert result.metrics["accuracy"] > 0.9
    sets = made.phases[1].data.evaluate
    rotated = train.evaluate(phase.task, result.state, sets, mesh=train.make_mesh())
    assert rotated["accuracy"] < 0.25


def test_fakes_are_integer_grey_levels_near_what_they_imitate():
    images = rotated_digits.digits(0)[0] * 16
    made = fake_digits.fakes(images[:300], images[:400])
    assert made.keys() == set(fake_digits.KINDS)
    for kind, fake in made.items():
        assert fake.shape == (400, 8, 8)
        np.testing.assert_array_equal(fake, np.clip(np.rint(fake), 0, 16))
        if kind != "mixture":
            assert 0.5 < np.sqrt(np.mean((fake - images[:400]) ** 2)) < 4
    # Each block of two by two is one grey level.
    blocks = made["sampling"].reshape(-1, 4, 2, 4, 2)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :, :1, :, :1], blocks.shape))


def test_detection_evaluator_gives_the_areas_of_scikit_learn():
    rng = np.random.default_rng(0)
    score, kind = np.round(rng.normal(size=200), 1), rng.integers(0, 6, 200)  # with ties
    found = fake_digits.DetectionEvaluator(None, seen=1).finish(
        eval={"score": score, "kind": kind, "loss": np.zeros(200)}
    )
    for name, k in (("seen", 1), ("pca", 2), ("mixture", 5)):
        rows = (kind == 0) | (kind == k)
        assert found[f"auc_{name}"] == pytest.approx(roc_auc_score(kind[rows] > 0, score[rows]), rel=1e-9)
    assert found["auc"] == pytest.approx(np.mean([found[f"auc_{n}"] for n in ("pca", "sampling", "dct", "mixture")]))
    assert found["accuracy"] == np.mean((score > 0) == (kind > 0))
    assert set(found) == set(fake_digits.DetectionEvaluator(None, seen=1).metrics)


def test_effort_trains_the_triplets_of_attention_and_the_head(configs):
    config = train.load_config(f"{configs}/adapters/fake_digits.py:effort_blur")
    task = fake_digits.build(config).phases[1].task
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    # 3 blocks x 4 matrices x (48 + 1 + 48), and the head.
    assert sum(x.size for x in jax.tree.leaves(params)) == 1164 + 98
    assert sum(x.size for x in jax.tree.leaves(variables)) > 80_000


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("rotated_digits.py:head", ["adapter.modules_to_save="], "at least one rule"),
        ("rotated_digits.py:head", ["adapter.target_modules=layer1"], "without adapter.method"),
        ("rotated_digits.py:lora", ["adapter.target_modules=layer3"], "'layer3' matches none"),
        ("fake_digits.py:probe_pca", ["data.fake=gan"], "data.fake: expected one of"),
        pytest.param("fake_digits.py:effort_pca", ["adapter.rank=49"], "residual: 49 triplets", marks=pytest.mark.slow),
    ],
)
def test_what_can_t_serve_is_refused(configs, tmp_path, spec, settings, message):
    with pytest.raises(ValueError, match=message):
        run(f"{configs}/adapters/{spec}", tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def mean_accuracy(configs, variant, tmp_path):
    spec = f"{configs}/adapters/rotated_digits.py:{variant}"
    settings = ["train.eval_every=540", "train.checkpoint_every=540"]
    runs = [run(spec, tmp_path / f"{variant}{seed}", f"seed={seed}", *settings) for seed in range(3)]
    return np.mean([result.metrics["accuracy"] for result in runs])


@pytest.mark.slow
def test_adapters_repair_rotated_digits(configs, tmp_path):
    for variant in ("lora", "rslora", "dora"):
        assert mean_accuracy(configs, variant, tmp_path) >= 0.92


@pytest.mark.slow
def test_singular_values_repair_rotated_digits(configs, tmp_path):
    alone, both, head = (mean_accuracy(configs, variant, tmp_path) for variant in ("svfit", "svfit_head", "head"))
    assert alone >= 0.85
    assert both >= 0.95
    assert both - head >= 0.04


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "margin"), [("blur", 0.02), ("pca", 0.1)])
def test_effort_finds_unseen_fakes_better_than_a_probe(configs, tmp_path, kind, margin):
    spec = f"{configs}/adapters/fake_digits.py"
    effort, probe = (run(f"{spec}:{m}_{kind}", tmp_path / m).metrics["auc"] for m in ("effort", "probe"))
    assert effort - probe >= margin


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vit_dora", "resnet_lora", "resnet_flora"])
def test_adapters_of_vision_networks_train_are_restored_and_exported(configs, tmp_path, variant):
    result = run(f"{configs}/adapters/rotated_images.py:{variant}", tmp_path / "run", "adapter.dropout=0.1", *SHORT)
    restored = train.restore(tmp_path / "run")
    params = jax.device_get(restored.state.params)
    chex.assert_trees_all_equal(params, jax.device_get(result.state.params))
    if variant == "vit_dora":
        config = rotated_images.CONFIGS["vit"]
        interop.save_peft_adapter(tmp_path / "adapter", config, params, restored.phase.task.settings)
        read = interop.load_peft_adapter(tmp_path / "adapter", config)
        chex.assert_trees_all_equal(read.trainable, params)


def test_a_network_that_is_not_there_is_named(configs, tmp_path):
    with pytest.raises(ValueError, match=r"model.name: expected one of .*'resnet'.*got 'vgg'"):
        run(f"{configs}/adapters/rotated_images.py", tmp_path / "run", "model.name=vgg")
    with pytest.raises(ValueError, match=r"variant: expected 'vit' or 'resnet'.*got 'vit_svfit'"):
        train.load_config(f"{configs}/adapters/rotated_images.py:vit_svfit")
