"""The ImageNet recipes: they build at the published sizes, and train on small images."""

import functools
import importlib.util
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from subspace_jax import data, nn, represent, train
from subspace_jax.represent.gcr import task as classify
from subspace_jax.train.optimizer import make_optimizer

from ..variants import rest_slow

CONFIGS = [
    ("imagenet_resnet", "resnet50d_k8", 23_500_000, 1000 * 2048 * 8),
    ("imagenet_resnet", "resnext50_softmax", 22_980_000, 1000 * 2049),
    ("imagenet_vgg", "k8", 128_950_000, 1000 * 4096 * 8),
    ("imagenet_swin", "k8", 27_500_000, 1000 * 768 * 8),
    ("imagenet_deit3", "k4", 21_670_000, 1000 * 384 * 4),
    ("imagenet_rsb", "a1_k8", 23_500_000, 1000 * 2048 * 8),
    ("imagenet_rsb", "a3_softmax", 23_500_000, 1000 * 2049),
]


def config_of(configs, name, variant):
    spec = importlib.util.spec_from_file_location(name, configs / "gcr" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def task_of(config, num_classes=1000):
    side, model = config.data.image.size, dict(config.model)
    loss, smoothing, dims = model.pop("loss"), model.pop("label_smoothing"), model.pop("dims")
    mixing = {name: model.pop(name) for name in ("mixup", "cutmix")}

    def make(key):
        shape = (side, side, 3)
        return represent.make_classifier(key, input_shape=shape, num_classes=num_classes, dims=dims[0], **model)

    return represent.ClassifierTask(make, loss=loss, label_smoothing=smoothing, mixing=mixing)


@pytest.mark.parametrize(("name", "variant", "body", "head"), rest_slow(CONFIGS, CONFIGS[0], CONFIGS[4]))
def test_a_recipe_has_the_published_number_of_parameters_and_its_loss_can_be_traced(configs, name, variant, body, head):
    config = config_of(configs, name, variant)
    task, side = task_of(config), config.data.image.size
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    count = {part: sum(math.prod(x.shape) for x in jax.tree.leaves(params[part])) for part in params}
    assert count["head"] == head
    assert count["backbone"] == pytest.approx(body, rel=0.005)
    batch = {
        "inputs": jax.ShapeDtypeStruct((64, side, side, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((64,), jnp.int32),
    }
    loss = functools.partial(task.loss, key=jax.random.key(0), step=0)
    loss, (after, _) = jax.eval_shape(loss, params, variables, batch)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    with jax.numpy_dtype_promotion("standard"):
        tx = make_optimizer(config.optim, 200_000, task.roles())
        assert jax.eval_shape(tx.init, params)
    axes = task.axes()
    assert jax.tree.structure(axes[0]) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("name", "variant"), [("imagenet_resnet", "k8"), ("imagenet_rsb", "a4_k8"), ("imagenet_swin", "k3")]
)
def test_get_config_refuses_unknown_variants(configs, name, variant):
    with pytest.raises(ValueError, match=f"variant: expected .*got '{variant}'"):
        config_of(configs, name, variant)


@pytest.fixture
def small_config(configs, tmp_path):
    """The digits recipe on a folder of eight images."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (20, 24 + i, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    config = config_of(configs, "digits_resnet", "k8")
    config.data.update({"name": "folder", "data_dir": str(tmp_path), "eval_split": "val", "batch_size": 8})
    config.model.dims = (2,)
    config.data.eval_batch_size = 8
    return config


def test_outline_gives_the_task_and_batch_shapes_of_build(configs, small_config):
    for config in (small_config, config_of(configs, "digits", "k8"), config_of(configs, "synthetic", "k4")):
        ((outlined,), (phase,)) = classify.outline(config).phases, classify.build(config).phases
        chex.assert_trees_all_equal_shapes_and_dtypes(outlined.data.batch, next(phase.data.train(0)))
        chex.assert_trees_all_equal_shapes_and_dtypes(
            *[jax.eval_shape(p.task.init, jax.random.key(0)) for p in (outlined, phase)]
        )


def test_outline_of_a_tfds_set_needs_no_data(configs, tmp_path):
    config = config_of(configs, "imagenet_swin", "k8")
    config.data.data_dir = str(tmp_path)
    (phase,) = classify.outline(config).phases
    task, batch = phase.task, phase.data.batch
    assert (batch["inputs"].shape, batch["inputs"].dtype) == ((1024, 224, 224, 3), jnp.uint8)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    assert jax.tree.leaves(params["head"])[0].shape == (1000, 768, 8)
    config.data.image.size = 0
    with pytest.raises(ValueError, match=r"data.image.size: images of 'imagenet2012' vary in size"):
        classify.outline(config)
    config.data.name = "imagenet2021"
    with pytest.raises(ValueError, match="TFDS knows no set 'imagenet2021'"):
        classify.outline(config)


def test_build_resizes_the_images_of_a_folder(small_config):
    (phase,) = classify.build(small_config).phases
    task = phase.task
    batch = next(phase.data.train(0))
    assert (batch["inputs"].shape, batch["inputs"].dtype) == ((8, 32, 32, 3), np.uint8)
    (shown,) = phase.data.evaluate["eval"]()
    assert shown["inputs"].shape == (8, 32, 32, 3)
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    sums = jax.eval_shape(functools.partial(task.evaluate, key=jax.random.key(0)), params, variables, shown)
    assert sums["count"].shape == ()
    assert jax.tree.leaves(params["head"])[0].shape == (2, 512, 2)
    small_config.data.eval_split = "test"
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        classify.build(small_config)


@pytest.mark.slow
def test_loss_of_mixed_images_is_that_of_mixed_targets():
    def make(key):
        return represent.make_classifier(key, input_shape=(4, 4, 1), num_classes=5, features=(8,), head="softmax")

    mixing = {"mixup": 1.0, "cutmix": 0.0}
    task = represent.ClassifierTask(make, label_smoothing=0.1, mixing=mixing)
    params, variables = jax.jit(task.init)(jax.random.key(0))
    batch = {"inputs": np.random.default_rng(0).random((6, 4, 4, 1), np.float32), "labels": np.arange(6) % 5}
    key = jax.random.key(1)
    loss = jax.jit(task.loss)(params, variables, batch, key=key, step=0)[0]
    mix = jax.jit(functools.partial(data.mix_images, **mixing))
    images, weight = mix(jax.random.split(key)[1], batch["inputs"])
    targets = 0.9 * np.eye(5)[batch["labels"]] + 0.02
    targets = weight * targets + (1 - weight) * np.asarray(data.partners(targets))
    scores = jax.jit(lambda x: jax.nn.log_softmax(task.module(params, variables)(x)))(images)
    np.testing.assert_allclose(loss, -np.mean(np.sum(targets * scores, axis=1)), rtol=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_the_parameters_and_statistics_of_an_uninterrupted_one(small_config, tmp_path):
    # A schedule would depend on the length of the run.
    small_config.optim.schedule = "constant"
    small_config.train.update({"steps": 4, "checkpoint_every": 2, "eval_every": 4})
    whole = train.run(small_config, tmp_path / "whole", progress=False)
    small_config.train.steps = 2
    train.run(small_config, tmp_path / "parts", progress=False)
    small_config.train.steps = 4
    parts = train.run(small_config, tmp_path / "parts", progress=False)
    chex.assert_trees_all_equal(whole.state.params, parts.state.params)
    chex.assert_trees_all_equal(whole.state.variables, parts.state.variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [("imagenet_resnet", "resnet50d_k8"), ("imagenet_swin", "k8"), ("imagenet_deit3", "k8")]
)
def test_a_step_at_the_papers_global_batch_fits_sixteen_chips_of_v5e(configs, name, variant):
    config = config_of(configs, name, variant)
    mesh = train.make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    task = task_of(config)
    tx = make_optimizer(config.optim, 200_000, task.roles())
    state, _ = train.state_shardings(task, tx, mesh)
    rows, side = config.data.batch_size, config.data.image.size
    batch = {
        "inputs": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        compiled = train.jit_train_step(task, tx, mesh).lower(state, batch).compile()
    assert bytes_per_chip(f"{name} {variant}", compiled) < 16e9


def bytes_per_chip(what, compiled):
    """Memory of a compiled program: arguments, results that alias none of them, and temporaries."""
    memory = compiled.memory_analysis()
    stored, results, shared, rest = (
        getattr(memory, f"{x}_size_in_bytes") for x in ("argument", "output", "alias", "temp")
    )
    print(f"\n{what} bytes per chip: arguments {stored}, results {results - shared}, rest {rest}")
    return stored + results - shared + rest


@pytest.mark.slow
def test_features_of_the_largest_dinov2_fit_sixteen_chips_of_v5e():
    mesh = train.make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    config = nn.VisionTransformerConfig.dinov2("giant", image_size=(224, 224))
    whole = NamedSharding(mesh, P())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), nn.param_shapes(config))
    rows = train.batch_sharding(mesh)
    shapes = {"inputs": ((512, 224, 224, 3), jnp.float32), "labels": ((512,), jnp.int32), "mask": ((512,), jnp.float32)}
    batch = {name: jax.ShapeDtypeStruct(*of, sharding=rows) for name, of in shapes.items()}
    step = represent.make_feature_step(lambda p, x: nn.vision_apply(config, p, x, dtype="bfloat16").pooled, mesh)
    held = bytes_per_chip("DINOv2 giant, 512 images", step.lower(params, batch).compile())
    assert 4 * 1.1e9 < held < 16e9  # all 1.1e9 parameters lie on every chip
