"""Adapters of small networks: a run as the loop has it, and the figures that the methods must reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import fake_digits, rotated_digits
from examples import rotated_images as rotated_images
from subspace_jax import interop, represent, train

SHORT = ["pretrain.epochs=1", "train.steps=4", "train.checkpoint_every=2", "train.eval_every=4"]

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


def run(spec, workdir, *settings):
    return train.run(train.override(train.load_config(spec), settings), workdir, progress=False)


def test_a_run_is_restored_with_its_singular_vectors(tmp_path, configs):
    result = run(f"{configs}/adapters/rotated_digits.py:svfit_head", tmp_path, "seed=1", *SHORT)
    experiment, state = train.restore(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.variables), jax.device_get(result.state.variables))
    shapes = jax.tree.map(jnp.shape, state.params)
    assert shapes == {
        "layer1": {"kernel": {"delta": (64,)}},
        "layer2": {"kernel": {"delta": (128,)}},
        "head": {"kernel": {"full": (128, 10)}, "bias": {"full": (10,)}},
    }
    assert isinstance(experiment.task, represent.TransferTask)
    assert "SVFit" in experiment.task.table


def test_pretraining_reads_upright_digits_and_not_turned_ones():
    images, labels = rotated_digits.digits(0)
    options = {"key": jax.random.key(1), "epochs": 15}
    flat = images.reshape(-1, 64)
    params = rotated_digits.mlp_init(jax.random.key(0))
    params = represent.train_whole(rotated_digits.mlp, params, flat[:1200], labels[:1200], **options)
    turned = np.rot90(images, axes=(1, 2)).reshape(-1, 64)
    upright, rotated = (
        np.mean(np.argmax(rotated_digits.mlp(params, x[1200:]), -1) == labels[1200:]) for x in (flat, turned)
    )
    assert upright > 0.9
    assert rotated < 0.25


def test_fakes_are_whole_grey_levels_near_what_they_imitate():
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


def test_areas_under_curves_are_those_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    logits = jnp.asarray(np.round(rng.normal(size=(200, 2)), 1), jnp.float32)  # with ties
    batch = {"kind": jnp.asarray(rng.integers(0, 6, 200)), "mask": jnp.asarray(rng.random(200) < 0.9, jnp.float32)}
    areas = fake_digits._curves(logits, batch, seen=1)
    kind, used, score = (
        np.asarray(batch["kind"]),
        np.asarray(batch["mask"]) > 0,
        np.asarray(logits[:, 1] - logits[:, 0]),
    )
    for name, k in (("seen", 1), ("pca", 2), ("mixture", 5)):
        rows = used & ((kind == 0) | (kind == k))
        # In float32 sums of some thousand halves are exact.
        np.testing.assert_allclose(areas[f"auc_{name}"], roc_auc_score(kind[rows] > 0, score[rows]), rtol=1e-5)
    np.testing.assert_allclose(
        areas["auc"], np.mean([areas[f"auc_{n}"] for n in ("pca", "sampling", "dct", "mixture")]), rtol=1e-6
    )


def test_effort_trains_the_triplets_of_attention_and_the_head(configs):
    config = train.load_config(f"{configs}/adapters/fake_digits.py:effort_blur")
    task, _ = fake_digits.build(config)
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
        ("fake_digits.py:effort_pca", ["adapter.rank=49"], "residual: 49 triplets"),
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


@pytest.mark.parametrize("variant", ["vit_dora", "resnet_lora", "resnet_flora"])
def test_adapters_of_vision_networks_train_are_restored_and_exported(configs, tmp_path, variant):
    result = run(f"{configs}/adapters/rotated_images.py:{variant}", tmp_path / "run", "adapter.dropout=0.1", *SHORT)
    experiment, state = train.restore(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(result.state.params))
    if variant == "vit_dora":
        config = rotated_images.CONFIGS["vit"]
        interop.save_peft_adapter(tmp_path / "adapter", config, state.params, experiment.task.settings)
        read = interop.load_peft_adapter(tmp_path / "adapter", config)
        jax.tree.map(np.testing.assert_array_equal, read.trainable, jax.device_get(state.params))


def test_a_network_that_is_not_there_is_named(configs, tmp_path):
    with pytest.raises(ValueError, match=r"model.name: expected one of .*'resnet'.*got 'vgg'"):
        run(f"{configs}/adapters/rotated_images.py", tmp_path / "run", "model.name=vgg")
    with pytest.raises(ValueError, match=r"variant: expected 'vit' or 'resnet'.*got 'vit_svfit'"):
        train.load_config(f"{configs}/adapters/rotated_images.py:vit_svfit")
